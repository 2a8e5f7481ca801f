"""The configuration of a run: frozen dataclasses, filled by defaults <- YAML <- `section.key=value` overrides.

`configfile` reads, checks and writes them, `configrules` says what their values may be, `configschema` lists the
keys. Every field is documented beneath it (`--help-config` prints that). Sizes are pixels, clocks are images seen,
and everything that changes the result of a run lives here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dist_t2i.models.config import (
    AlignmentConfig,
    AugmentConfig,
    ModelConfig,
    TextConfig,
)


@dataclass(frozen=True)
class DataConfig:
    train: str | tuple[str, ...] = ""
    """What to train on: a sharded set (a folder or URL that holds manifest.json), or WebDataset tars as a URL with braces
    or a glob: `s3://bucket/coco/train-{000000..000591}.tar`. Several of them as a list."""
    weights: tuple[float, ...] = ()
    """How often each entry of `train` comes, relative to the others; empty: every picture once an epoch."""
    image_size: int = 64
    """Training resolution in pixels, square; a power of two, at least 32."""
    workers: int = 1
    """Loader processes per rank; 0 decodes in the training process."""
    shuffle_window: int = 16_384
    """Samples that are shuffled among each other at a time; a reader keeps about two windows within reach."""
    shuffle_shards: int = 16
    """Shards from which a window takes its samples."""
    flip: bool = True
    """Mirror a picture left to right on every other visit, by the rule of (seed, images seen)."""
    crop: float = 1.0
    """Smallest share of the short side that a random crop keeps; 1 takes the central square."""
    max_tokens: int = 32
    """Captions are cut after this many tokens."""
    on_bad: Literal["budget", "strict"] = "budget"
    """A sample that cannot be used: `budget` replaces and counts it, `strict` stops the run."""
    max_bad_fraction: float = 0.01
    """`budget` stops the run when more than this share of the images seen had to be replaced."""
    retry_seconds: float = 300.0
    """How long a remote read that fails is tried again before its sample counts as bad."""
    stall_seconds: float = 10.0
    """A remote read that brings nothing for so long has failed; one that takes six times as long as well."""
    cache: str = "auto"
    """Folder on this machine's disk in which parts of remote shards are kept for all its processes; `auto`: within the
    job's or the system's folder for temporary files; `none`: nothing is kept, every sample is a request of its own."""
    cache_gb: float = 20.0
    """Bound of the cache, in GB."""
    endpoint: str = ""
    """URL of an S3-compatible server; empty: AWS_ENDPOINT_URL, or AWS. Credentials come from the environment."""
    region: str = ""
    """Of the bucket; empty: AWS_REGION."""
    anonymous: bool = False
    """Whether requests go unsigned, for public buckets."""


@dataclass(frozen=True)
class EditConfig:
    """Changing a given picture as a text says; `width` turns it on."""

    width: int = 0
    """Channels of the encoder of the source picture, at every scale; 0: pictures are made from texts alone."""
    init: str = ""
    """Run folder or exported model whose weights the run begins with; empty: fresh ones. Read at the start only."""
    own: float = 0.3
    """Share of the pictures whose source is the picture itself, which must come back then."""
    none: float = 0.1
    """Share of the pictures without a source, made from their text alone. All others are made from the picture of another
    sample with a near caption."""
    words: int = 4
    """Two captions are near when they agree but for one run of so many words."""


@dataclass(frozen=True)
class LossConfig(AlignmentConfig):
    mismatched: float = 0.5
    """Weight of real pictures with a wrong caption among the fakes of D's hinge loss (0 to 1)."""
    pixels: float = 0.0
    """Weight of G's mean absolute error (pixels in [-1, 1]) from the real pictures of its captions. For sets in which a caption
    settles most of the picture, such as drawings; elsewhere 0: what a caption leaves open would become a blur."""
    reconstruction: float = 10.0
    """Weight of G's mean absolute error (pixels in [-1, 1]) where a picture is its own source; only with `edit.width`."""
    edit_target: float = 0.0
    """Weight of the squared distance of G's picture to the true one, as a share of the source's, where the source is another
    sample's picture (`losses.way_left`). Squared, since most pixels agree with the source, and copying it has the least
    absolute error for long. For sets in which pictures with near captions agree pixel by pixel but for what the captions
    say, such as drawings; elsewhere 0."""
    kl: float = 0.02
    """Weight of the conditioning augmentation's KL divergence."""
    penalty: Literal["none", "r1", "ma_gp", "fd_r1"] = "r1"
    """`ma_gp`: DF-GAN's matching-aware gradient penalty; `fd_r1`: R1 by finite differences, for any ZeRO stage."""
    penalty_weight: float = 0.05
    """Weight of the penalty, on the squared gradient norm."""
    penalty_every: int = 8
    """The penalty is computed on every n-th step and weighted n times (StyleGAN2, sec. 4: lazy regularisation)."""
    penalty_sigma: float = 0.01
    """Step of the finite difference; `fd_r1` only."""


@dataclass(frozen=True)
class OptimizerConfig:
    generator_matrices: Literal["adamw", "muon"] = "adamw"
    """What steps the generator's matrices and kernels; its biases and its text encoder are AdamW's."""
    generator_lr: float = 8e-4
    """Peak learning rate of the generator."""
    discriminator_lr: float = 8e-4
    """Peak learning rate of the discriminator."""
    text_lr_scale: float = 1.0
    """Learning rate of the text encoders relative to their engine's."""
    beta1: float = 0.0
    """Adam's first-moment decay."""
    beta2: float = 0.99
    """Adam's second-moment decay."""
    epsilon: float = 1e-8
    """AdamW's, added to the root of the second moment."""
    muon_momentum: float = 0.9
    """Share of its past that Muon's moving average of gradients keeps at each step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_images: int = 2_000
    """The learning rates rise linearly from 0 over this many images; 0 starts at the peak."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls once `decay_start` of the images are seen."""
    decay_start: float = 0.5
    """Share of train.total_images after which the decay begins."""
    final_lr_scale: float = 0.0
    """Learning rates at the end, relative to their peak."""
    gradient_clipping: float = 0.0
    """Largest global gradient norm; 0 clips nothing. Always written: DeepSpeed's own default would be 1.0."""


@dataclass(frozen=True)
class EmaConfig:
    half_life_images: int = 10_000
    """Images after which a weight's share in the moving average has halved."""
    ramp: float = 0.05
    """Early on the half-life is at most this share of the images seen (EDM, sec. F.2: EMA warm-up)."""


@dataclass(frozen=True)
class EngineConfig:
    generator_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of the generator's engine (and its text encoder's)."""
    discriminator_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of the discriminator's engine; 3 only with loss.penalty fd_r1 or none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the processor or GPU computes it natively, fp32 elsewhere."""
    accumulation: int = 1
    """Micro-batches per step and rank; the global batch stays."""
    offload: Literal["none", "cpu"] = "none"
    """Where optimizer states live (ZeRO stage 1 to 3)."""


@dataclass(frozen=True)
class TrainConfig:
    total_images: int = 1_000_000
    """Images to train on, repeats counted; the run is finished then."""
    global_batch: int = 64
    """Images per step, over all ranks and micro-batches."""
    seed: int = 0
    """Seeds weights, order, captions, noise and augmentation; each is a function of it and the images seen."""
    hang_seconds: float = 600.0
    """A step that takes longer counts as hung: the run is ended with status 77, naming the rank; 0 waits for ever."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_images: int = 50_000
    """Images between two checkpoints."""
    keep_last: int = 2
    """Checkpoints kept, newest first; at least 1."""
    keep_every_images: int = 0
    """Besides the last ones, keep a checkpoint each time this many images have passed; 0 keeps none."""
    mirror: str = ""
    """Folder or URL (`s3://bucket/runs/mine`) that a process beside rank 0 copies checkpoints to, and that a run whose
    folder is lost goes on from; empty: none. One run, one mirror. Credentials come from the environment."""


@dataclass(frozen=True)
class ReportConfig:
    every_steps: int = 20
    """Steps between two lines of metrics.jsonl (and of the log, when not on a terminal)."""
    sample_every_images: int = 20_000
    """Images between two sample grids."""
    sample_prompts: tuple[str, ...] = ()
    """Captions of the sample grid; empty takes them from the held-out set, or from the training set."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: `offline` writes RUN/wandb for a later `wandb sync`, `online` also uploads."""
    wandb_project: str = "dist_t2i"
    """Project the run appears under in W&B."""


@dataclass(frozen=True)
class EvalConfig:
    """Scores during training (see docs/evaluation.md)."""

    every_images: int = 0
    """Images between two evaluations of the moving average, on rank 0; there is one at the end as well. 0: none."""
    protocol: str = "quick"
    """Protocol by name, or a .yaml file; a small one, since training waits."""
    data: str = ""
    """Set with the held-out split; empty: that of data.train."""
    metric: str = "kid"
    """The score by which the best checkpoint is kept, on the protocol's first split."""


@dataclass(frozen=True)
class RunConfig:
    folder: str = ""
    """Where the run lives; empty: runs/<name of the config file>."""
    name: str = ""
    """Name shown in reports and W&B; empty takes the folder's."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
