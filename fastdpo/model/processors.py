"""transformers' processors where no video is read."""

from functools import cache

from transformers import ProcessorMixin


@cache
def without_video(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """This class of processors, which may be made with `video_processor=None`: its own needs torchvision."""

    def check(self, name, argument):
        if name != "video_processor" or argument is not None:
            return cls.check_argument_for_proper_class(self, name, argument)

    names = {"check_argument_for_proper_class": check, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), names)
