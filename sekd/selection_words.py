"""What is distilled where, in words: for the model card and the report."""

import re

from sekd.classes import CLASS_SELECTIONS
from sekd.policies import POLICIES
from sekd.schedules import Scheduled, make_schedule
from sekd.scores import RANDOM
from sekd.selection_config import SelectionConfig

ACRONYMS = re.compile(r"\b(kl|kd|ce|at|jsd)\b")


def describe_selection(args: SelectionConfig, from_cache: bool = False) -> str:
    """What is distilled where, in a part of a sentence."""
    policy, classes = POLICIES[args.position_policy], CLASS_SELECTIONS[args.class_selection]
    fraction = args.position_fraction
    is_all = args.scoring is None and policy.uniform_if_all
    words = POLICIES["all"].words if is_all else policy.words or "positions that {policy} chooses"
    parts = [
        f"{_spell(str(args.divergence))} at "
        + words.format(fraction=_share(fraction), score=_describe_scores(args), policy=f"`{args.position_policy}`")
    ]
    if classes.select is not None:
        words = classes.words or "classes that {name} chooses"
        parts.append("over " + words.format(classes=args.class_samples, name=f"`{args.class_selection}`"))
    if args.kd_weight != 1:
        parts.append(f"mixed with cross-entropy (kd_weight {args.kd_weight:g})")
    if args.kd_temperature != 1:
        parts.append(f"at temperature {args.kd_temperature:g}")
    if args.sample_fraction < 1:
        is_random = args.sample_score == RANDOM
        ending = "drawn at random" if is_random else f"with the highest {_spell(args.sample_score)}"
        parts.append(f"on the {_share(args.sample_fraction)} of the samples {ending}")
    if not args.any_on_policy or args.all_on_policy:
        parts.append("on-policy" if args.any_on_policy else "off-policy")
    else:
        parts.append(f"on-policy in {_share(args.lmbda)} of the steps")
    if from_cache:
        parts.append("from a cache of the teacher")
    return ", ".join(parts)


def _describe_scores(args: SelectionConfig) -> str:
    scoring = args.scoring
    if scoring is None or not scoring.weights:
        return ""
    if len(scoring.names) == 1:
        return _spell(scoring.names[0])
    terms = [f"{weight:g} x {_spell(name)}" for name, weight in zip(scoring.names, scoring.weights, strict=True)]
    return f"sum of {' and '.join(terms)}"


def _spell(name: str) -> str:
    """The name of a strategy as words, such as "reverse KL"."""
    return ACRONYMS.sub(lambda match: match[0].upper(), name.replace("_", " "))


def _share(value: Scheduled) -> str:
    """A fraction in percent. Of a schedule, also the later ones: "100 %, 20 % from step 500 on,"."""
    schedule = make_schedule("fraction", value)
    (_, first), *later = ((step, f"{number * 100:.6g} %") for step, number in schedule.points)
    form = ", on a line to {} at step {}" if schedule.is_linear else ", {} from step {} on"
    return first + "".join(form.format(share, step) for step, share in later) + "," * bool(later)
