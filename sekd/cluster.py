"""Ray: the cluster that RAY_ADDRESS names, or else one that is started here."""

import logging
import os
from typing import Any


def connect_to_ray() -> tuple[Any, bool]:
    """The module ``ray``, connected, and whether Ray was started here: then the caller shuts it down."""
    import ray

    starts = not ray.is_initialized()
    if starts:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it, Ray warns of a new default
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    return ray, starts
