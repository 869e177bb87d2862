"""Which teacher does a run have?"""

from transformers import PreTrainedModel

from sekd.cache.teacher import CacheSource
from sekd.config import SEKDConfig
from sekd.teachers import ModelSource, TeacherSource


def make_teacher_source(teacher_model: str | PreTrainedModel | None, args: SEKDConfig) -> TeacherSource:
    """The source of a run's teacher: the cache, else the given model, else the model that ``args`` name."""
    if args.teacher_cache is not None:
        return CacheSource(args)
    teacher_model = teacher_model or args.teacher_model_name_or_path
    if teacher_model is None:
        raise ValueError("there is no teacher: set teacher_model_name_or_path to a folder or hub id")
    return ModelSource(teacher_model, args)
