"""Check values and combinations of options before any model loads.

The functions raise ValueError. The message names the field, the value and how to fix it.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

from sekd.validation.inputs import check_prompts
from sekd.validation.rollouts import check_rollouts, check_sampling
from sekd.validation.selection import check_selection
from sekd.validation.values import check_numbers, is_installed, within

if TYPE_CHECKING:
    from sekd.config import SEKDConfig


def check_config(args: "SEKDConfig") -> None:
    """Check the values of a configuration, and that they work together."""
    own = [f for f in fields(args) if f.name in type(args).__annotations__]
    check_numbers(args, [f.name for f in own if f.type in (int, float, "int", "float")])
    check_selection(args)
    check_prompts(args)
    check_sampling(args)
    check_rollouts(args)
    within("lmbda", args.lmbda, 0, 1, "0 is off-policy, 1 on-policy")
    within("kd_weight", args.kd_weight, 0, 1, "1 is the divergence alone, 0 cross-entropy alone")
    if args.kd_temperature <= 0:
        raise ValueError(f"kd_temperature {args.kd_temperature} must be above 0; 1 changes nothing")
    for name in ("max_length", "max_prompt_length", "max_completion_length", "head_chunk_rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} must be at least 1")
    if args.torch_compile:
        raise ValueError("torch_compile: true is not supported: sekd calls the student in parts; set it to false")
    if args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint: true is not supported; leave it out: save_on_signal saves a whole checkpoint on "
            "SIGTERM"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: true is not supported: when memory runs out, it starts again with the weights and "
            "optimizer of the failed attempt; set it to false, halve per_device_train_batch_size and double "
            "gradient_accumulation_steps"
        )
    if any(name in str(args.optim) for name in ("bnb", "8bit", "4bit")) and not is_installed("bitsandbytes"):
        raise ValueError(f"optim {args.optim} needs bitsandbytes: run `pip install bitsandbytes`")
