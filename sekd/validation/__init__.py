"""Check values and combinations of options before any model loads.

The functions raise ValueError. The message names the field, the value and how to fix it.
"""

from typing import TYPE_CHECKING

from sekd.validation.inputs import check_prompts
from sekd.validation.rollouts import check_rollouts, check_sampling
from sekd.validation.selection import check_selection
from sekd.validation.teachers import check_teacher
from sekd.validation.training import check_training
from sekd.validation.values import within

if TYPE_CHECKING:
    from sekd.config import SEKDConfig


def check_config(args: "SEKDConfig") -> None:
    """Check the values of a configuration, and that they work together."""
    check_selection(args)
    check_prompts(args)
    check_sampling(args)
    check_rollouts(args)
    hint = "is outside [0, 1]; 0 is off-policy, 1 on-policy"
    args.lmbda_schedule.check_values("lmbda", lambda value: 0 <= value <= 1, hint)
    within("kd_weight", args.kd_weight, 0, 1, "1 is the divergence alone, 0 cross-entropy alone")
    if args.kd_temperature <= 0:
        raise ValueError(f"kd_temperature {args.kd_temperature} must be above 0; 1 changes nothing")
    for name in ("max_length", "max_prompt_length", "max_completion_length", "head_chunk_rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} must be at least 1")
    check_teacher(args)
    check_training(args)
