"""The type checker that jaxtyping applies under pytest: beartype, to which 1 is a float (PEP 484)."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
