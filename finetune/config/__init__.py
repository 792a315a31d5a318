"""The config of a fine-tuning run: what a YAML file of ``diptych finetune`` may say."""

from .adapt import AdaptConfig
from .head import OPTIONS, STAGES, HeadConfig, Link
from .modality import ENCODED, ModalityConfig
from .run import CvConfig, EvalConfig, FinetuneConfig, LabelledDataConfig, StoppingConfig
from .search import SearchConfig
from .source import ImageEncoderConfig, SourceConfig, TextEncoderConfig
from .task import TaskConfig

__all__ = [
    "ENCODED",
    "OPTIONS",
    "STAGES",
    "AdaptConfig",
    "CvConfig",
    "EvalConfig",
    "FinetuneConfig",
    "HeadConfig",
    "ImageEncoderConfig",
    "LabelledDataConfig",
    "Link",
    "ModalityConfig",
    "SearchConfig",
    "SourceConfig",
    "StoppingConfig",
    "TaskConfig",
    "TextEncoderConfig",
]
