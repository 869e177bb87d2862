"""Where the teacher is, in how many bits, and over which processes."""

from typing import TYPE_CHECKING

import torch

from sekd.scores import needs_teacher
from sekd.validation.values import is_installed

if TYPE_CHECKING:
    from sekd.config import SEKDConfig


def check_teacher(args: "SEKDConfig") -> None:
    """Check the teacher's device, bits and shards."""
    bits = check_bits(args.teacher_load_in_4bit, args.teacher_load_in_8bit)
    if args.teacher_device is not None:
        _check_name(args.teacher_device)
    if not args.teacher_fsdp:
        return
    for name in (*bits, "teacher_device"):
        if value := getattr(args, name):
            raise ValueError(
                f"teacher_fsdp true with {name} {value!r}: only whole weights on the processes' own devices can be "
                "sharded; leave one out"
            )
    if args.teacher_cache is not None:
        raise ValueError(
            f"teacher_fsdp true has no effect with teacher_cache {args.teacher_cache!r}, which replaces the teacher; "
            "leave it out"
        )
    if args.sample_fraction < 1 and needs_teacher(args.sample_score):
        raise ValueError(
            f"teacher_fsdp true with sample_score {args.sample_score!r}: samples are scored before the teacher is "
            "sharded, and each process would hold all of it; set sample_score: student_entropy, or teacher_fsdp: false"
        )


def check_bits(in_4bit: bool, in_8bit: bool) -> list[str]:
    """Check that a teacher has one kind of weights, and return the fields that quantize it."""
    bits = [name for name, on in (("teacher_load_in_4bit", in_4bit), ("teacher_load_in_8bit", in_8bit)) if on]
    if len(bits) == 2:
        raise ValueError(f"{bits[0]} true with {bits[1]} true: a teacher has one kind of weights; leave one out")
    if bits and not is_installed("bitsandbytes"):
        raise ValueError(f"{bits[0]} true needs bitsandbytes: run `pip install bitsandbytes`, or leave it out")
    return bits


def _check_name(name: str) -> None:
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"teacher_device {name!r} is no device; write cpu, cuda or, for one GPU, cuda:1") from None


def _check_presence(name: str) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    own = [] if accelerator is None else [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if name not in ("cpu", *own) and (accelerator is None or name != accelerator.type):
        raise ValueError(f"teacher_device {name!r}: this machine has {', '.join(['cpu', *own])}; name one of them")


def check_place(args: "SEKDConfig") -> None:
    """Check that this machine has the teacher's device, and that its place fits the number of processes."""
    if args.teacher_device is not None:
        _check_presence(args.teacher_device)
    if args.teacher_fsdp and args.world_size == 1:
        raise ValueError(
            "teacher_fsdp true shards over several processes, and there is one: start them with `accelerate launch`, "
            "or leave it out"
        )
    if args.teacher_device is not None and torch.device(args.teacher_device).index is not None and args.world_size > 1:
        raise ValueError(
            f"teacher_device {args.teacher_device!r} would hold a teacher for each of the {args.world_size} processes; "
            "leave it out, or shard the teacher with teacher_fsdp: true"
        )
