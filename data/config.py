"""What a pretraining run reads, and how: the ``data`` part of its config."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..configs.load import StrictModel
from .augment import AugmentConfig
from .captions import CaptionConfig
from .filters import FilterConfig
from .image_header import MAX_PIXELS

__all__ = ["DataConfig", "SourceConfig"]


class SourceConfig(FilterConfig):
    """One data set of a run: where it is, how much of it, and which of its samples."""

    data: str
    """Folder of shards, a path or a URL (s3://, gs://, hf://, https://), or corpus:NAME/SPLIT for a corpus
    that Diptych fetched. Tars without an index are streamed: see docs/remote.md."""
    name: str | None = None
    """What it is called in messages; null for the last part of ``data``."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the samples relative to the other sources' weights; give all sources one or none. Null
    takes each in proportion to its samples."""
    captions: CaptionConfig | None = None
    """Which of its texts are taken, null for ``data.captions``, whose ``truncate`` holds for all."""

    @property
    def label(self) -> str:
        """The name, or the last part of ``data``."""
        return self.name or self.data.rstrip("/").rsplit("/", 1)[-1]


class DataConfig(StrictModel):
    """What is trained on and how it is read."""

    train: str | tuple[SourceConfig, ...]
    """A folder of shards (see ``SourceConfig.data``), or a list of sources that are mixed or filtered."""
    epoch_samples: int | None = Field(default=None, ge=1)
    """Samples of an epoch. Null for all there are; must be given for tars without an index, which nobody has
    counted. With it, or with several sources, samples are drawn without replacement from each source, which
    begins anew when it has been gone through, not when the epoch ends."""
    captions: CaptionConfig = CaptionConfig()
    augment: AugmentConfig = AugmentConfig()
    weight_key: str | None = None
    """Key of a sample's JSON whose number, 0 or more, is the weight of its pair in the loss (1 where a sample
    has none); null weighs all alike."""
    workers: int = Field(default=0, ge=0)
    """Processes per rank that decode; 0 decodes in the training process. The order does not depend on it."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each worker has ready."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers start; null for the platform's default."""
    lanes: int | None = Field(default=None, ge=1)
    """Lanes of the order; must divide the global batch. Null takes 1 for up to 262,144 samples, else up to
    one for every eight shards. Stored with the run: a resumed one keeps its own."""
    window: int | None = Field(default=None, ge=1)
    """Samples of a lane that are shuffled among each other. Null takes four shards' worth and at least
    262,144 over all lanes, so that small data is shuffled as a whole. Stored with the run, too."""
    cache_gb: float = Field(default=50.0, ge=0)
    """Disk, in 10^9 bytes, that this machine gives to shards from URLs, for all processes together; 0 fetches
    sample by sample and keeps nothing."""
    cache: str | None = None
    """Folder of those shards; null for ``shards`` in Diptych's cache."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Images with more pixels count as damaged and are not decoded."""
    on_bad: Literal["mask", "raise"] = "mask"
    """What a damaged sample does: its row is masked out of the loss, or the run stops."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Distinct damaged samples, as a fraction of those seen, past which a run stops; see ``bad_allowed``."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if not self.sources:
            raise ValueError("train: the list of sources is empty; name a folder of shards")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("train: some sources have a weight and some have none; give all of them one")
        labels = [source.label for source in self.sources]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"train: two sources are called {twice[0]}; give them a name each")
        own = [source.captions for source in self.sources if source.captions is not None]
        if any(captions.truncate not in ("end", self.captions.truncate) for captions in own):
            raise ValueError("train: truncate is one for all sources; set data.captions.truncate")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """``train`` as a list of sources."""
        return (SourceConfig(data=self.train),) if isinstance(self.train, str) else self.train

    @property
    def storage(self) -> dict[str, Any]:
        """How ``open_shards`` is to read URLs."""
        return {"cache_gb": self.cache_gb, "cache": self.cache}

    def bad_allowed(self, samples_seen: int, num_samples: int) -> int:
        """How many distinct samples may be damaged after ``samples_seen`` of a set of ``num_samples``.

        The fraction of the distinct samples seen, plus three standard deviations and one sample, so that
        neither chance nor a single sample of a tiny set stops a run. None at all for a fraction of 0.
        """
        mean = self.max_bad_fraction * min(samples_seen, num_samples)
        return int(1 + mean + 3 * mean**0.5) if self.max_bad_fraction else 0
