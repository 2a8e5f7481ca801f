"""The configuration of a run: frozen dataclasses, filled by defaults <- YAML <- `section.key=value` overrides.

The string beneath a field documents its key (`--help-config` prints it); its `setting` states the range, and whether
the key may change on resume. Sizes are in pixels and durations in images seen unless a key says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_t2i.models.config import AugmentConfig, ModelConfig, TextConfig
from dist_t2i.utils.settings import NOT_NEGATIVE, POSITIVE, SHARE, Bounds, Resume, at_least, section, setting

RENAMED = {
    "model.generator.colours": "model.generator.colors",
    "model.generator.colour_sharpness": "model.generator.color_sharpness",
}
"""Name of a key in earlier versions -> its present name, in the same section. Files and overrides may use both."""


@dataclass(frozen=True)
class DataConfig:
    # FREE, because a set may move. On resume, the fingerprints of the sets are compared instead of their paths.
    train: str | tuple[str, ...] = setting("", resume=Resume.FREE)
    """Training set: a sharded set (a folder or URL that holds manifest.json), or WebDataset tars as a URL with braces
    or a glob: `s3://bucket/coco/train-{000000..000591}.tar`. A list mixes several sets."""
    weights: tuple[float, ...] = setting((), POSITIVE)
    """Relative sampling frequency of each entry of `train`; empty: every picture is used once per epoch."""
    image_size: int = setting(64, Bounds(32, 4096), Resume.FIXED)
    """Training resolution in pixels, square; a power of two, at least 32."""
    workers: int = setting(1, resume=Resume.FREE)
    """Loader processes per rank; 0 decodes in the training process."""
    shuffle_window: int = setting(16_384, at_least(1))
    """Samples per shuffle window; a reader holds about two windows in memory."""
    shuffle_shards: int = setting(16, at_least(1))
    """Number of shards from which a shuffle window takes its samples."""
    flip: bool = True
    """Mirrors the picture on a random half of its visits, as a function of the seed and the images seen."""
    crop: float = setting(1.0, Bounds(0, 1, above=True))
    """Smallest share of the short side that a random crop keeps; 1 always keeps the central square."""
    max_tokens: int = setting(32, Bounds(2, 4096), Resume.FIXED)
    """Captions are truncated to this many tokens."""
    on_bad: Literal["budget", "strict"] = setting("budget", resume=Resume.FREE)
    """How a sample that cannot be used is handled: `budget` replaces and counts it, `strict` stops the run."""
    max_bad_fraction: float = setting(0.01, SHARE, Resume.FREE)
    """With `budget`, the run stops once more than this share of the images seen has been replaced."""
    retry_seconds: float = setting(300.0, resume=Resume.FREE)
    """Seconds for which a failing remote read is retried before its sample counts as bad."""
    stall_seconds: float = setting(10.0, POSITIVE, Resume.FREE)
    """A remote read fails after this many seconds without data; a complete read may take six times this long."""
    cache: str = setting("auto", resume=Resume.FREE)
    """Folder on the local disk that caches parts of remote shards for all processes of this machine; `auto`: inside the
    temporary folder of the job or the system; `none`: no cache, one request per sample."""
    cache_gb: float = setting(20.0, resume=Resume.FREE)
    """Largest size of the cache, in GB."""
    endpoint: str = setting("", resume=Resume.FREE)
    """URL of an S3-compatible server; empty: AWS_ENDPOINT_URL, or AWS. Credentials come from the environment."""
    region: str = setting("", resume=Resume.FREE)
    """Region of the bucket; empty: AWS_REGION."""
    anonymous: bool = setting(False, resume=Resume.FREE)
    """Sends unsigned requests, for public buckets."""


@dataclass(frozen=True)
class EditConfig:
    """Text-guided editing of a source picture; `width` turns it on."""

    width: int = setting(0, resume=Resume.FIXED)
    """Channels of the source encoder at every scale; 0: no editing, pictures come from texts only."""
    init: str = setting("", resume=Resume.FREE)  # read once, when the run starts
    """Run folder or exported model whose weights initialize the run; empty: random weights. Read at the start only."""
    own: float = setting(0.3, SHARE)
    """Share of the samples whose source is their own picture, which must be reproduced."""
    none: float = setting(0.1, SHARE)
    """Share of the samples without a source, generated from their text alone. All other samples edit the picture of a
    sample with a near caption."""
    words: int = setting(4, at_least(1))
    """Two captions are near when they differ only in one group of at most this many consecutive words."""


@dataclass(frozen=True)
class LossConfig:
    """Weights and temperatures of the losses. An alignment term (losses/alignment.py) and its weight share a name."""

    d_alignment: float = 1.0
    """Weight of D's InfoNCE between real pictures and their captions."""
    d_alignment_regions: float = 1.0
    """Weight of D's InfoNCE between the positions of its region maps and captions (0 without region maps)."""
    g_alignment_text: float = 1.0
    """Weight of G's InfoNCE between its pictures and S_D of their captions."""
    g_alignment_image: float = 1.0
    """Weight of G's InfoNCE between its pictures and the real pictures of the same captions."""
    g_alignment_regions: float = 1.0
    """Weight of G's InfoNCE between its pictures and the real ones, at each position of D's region maps."""
    temperature: float = setting(0.1, POSITIVE)
    """Temperature of the InfoNCE losses on whole pictures and sentences."""
    region_negatives: int = 0
    """Number of other positions that are negatives for each position of a fake's region map, besides the same position
    of other pictures. They provide a gradient where all pictures look alike, such as on a plain background."""
    region_temperature: float = setting(0.1, POSITIVE)
    """Temperature of the InfoNCE losses on regions."""
    d_alignment_words: float = 1.0
    """Weight of D's InfoNCE between real pictures and the words of their captions (without `words` the term is 0)."""
    g_alignment_words: float = 1.0
    """Weight of G's InfoNCE between its pictures and S_D's words of their captions."""
    word_temperature: float = setting(0.1, POSITIVE)
    """Temperature of the InfoNCE losses on words."""
    word_sharpness: float = setting(5.0, POSITIVE)
    """Inverse temperature of a word's attention to regions and of pooling over words (AttnGAN: gamma 1 and 2)."""
    g_mode_seeking: float = setting(0.0, NOT_NEGATIVE)
    """Weight of G's mode seeking (`losses.mode_seeking`): two pictures of one caption must differ in D's features. It
    keeps G from ignoring the noise. 0: no mode seeking."""
    mismatched: float = setting(0.5, SHARE)
    """Weight of real pictures with a wrong caption among the negatives of D's hinge loss (0 to 1)."""
    pixels: float = 0.0
    """Weight of G's mean absolute error (pixels in [-1, 1]) against the real pictures of its captions. Use this loss
    for sets whose captions determine most of the picture, such as drawings. It blurs everything that a caption does not
    determine."""
    reconstruction: float = 10.0
    """Weight of G's mean absolute error (pixels in [-1, 1]) on edits of a picture into itself (`edit.own`)."""
    edit_target: float = 0.0
    """Weight of the squared distance between G's picture and the target, divided by the squared distance between source
    and target (`losses.way_left`). This loss applies to samples whose source is another sample's picture. Use it only
    for sets such as drawings, in which pictures with near captions agree pixel by pixel except where the captions
    differ."""
    kl: float = 0.02
    """Weight of the conditioning augmentation's KL divergence."""
    penalty: Literal["none", "r1", "ma_gp", "fd_r1"] = "r1"
    """D's gradient penalty. `ma_gp`: DF-GAN's, matching-aware; `fd_r1`: R1 by finite differences, at any ZeRO stage."""
    penalty_weight: float = 0.05
    """Weight of the penalty. For R1, the weight multiplies the squared gradient norm, without a factor of 1/2."""
    penalty_every: int = setting(8, at_least(1))
    """The penalty is computed every n-th step, with n times its weight (StyleGAN2, sec. 3.1: lazy regularization)."""
    penalty_sigma: float = setting(0.01, POSITIVE)
    """Step of the finite difference; `fd_r1` only."""


@dataclass(frozen=True)
class OptimizerConfig:
    generator_matrices: Literal["adamw", "muon"] = setting("adamw", resume=Resume.FIXED)
    """Optimizer of the generator's matrices and kernels. The generator's biases and text encoder always use AdamW."""
    generator_lr: float = setting(8e-4, POSITIVE)
    """Peak learning rate of the generator."""
    discriminator_lr: float = setting(8e-4, POSITIVE)
    """Peak learning rate of the discriminator."""
    text_lr_scale: float = 1.0
    """Learning rate of each text encoder, relative to the learning rate of its engine."""
    beta1: float = setting(0.0, Bounds(0, 1, below=True))
    """Adam's first-moment decay."""
    beta2: float = setting(0.99, Bounds(0, 1, below=True))
    """Adam's second-moment decay."""
    epsilon: float = setting(1e-8, POSITIVE)
    """AdamW's epsilon, added to the root of the second moment."""
    muon_momentum: float = 0.9
    """Decay of Muon's moving average of gradients."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_images: int = 2_000
    """The learning rates rise linearly from 0 over this many images; 0 starts at the peak."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rates' decay, which begins after `decay_start`."""
    decay_start: float = setting(0.5, SHARE)
    """Share of train.total_images after which the decay begins."""
    final_lr_scale: float = setting(0.0, SHARE)
    """Learning rates at the end, relative to their peak."""
    gradient_clipping: float = 0.0
    """Largest global gradient norm; 0 turns clipping off. This value also replaces DeepSpeed's default of 1.0."""


@dataclass(frozen=True)
class EmaConfig:
    half_life_images: int = setting(10_000, at_least(1))
    """Images after which a weight's share in the moving average has halved."""
    ramp: float = setting(0.05, SHARE)
    """Early in training the half-life is at most this share of the images seen (EDM, sec. F.2: EMA warm-up)."""


@dataclass(frozen=True)
class EngineConfig:
    generator_stage: Literal[0, 1, 2, 3] = setting(0, resume=Resume.FREE)
    """ZeRO stage of the engine that holds the generator and its text encoder."""
    discriminator_stage: Literal[0, 1, 2, 3] = setting(0, resume=Resume.FREE)
    """ZeRO stage of the discriminator's engine; 3 only with loss.penalty fd_r1 or none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the processor or GPU computes it natively, fp32 elsewhere."""
    accumulation: int = setting(1, at_least(1), Resume.FREE)
    """Micro-batches per step and rank, into which the global batch is divided."""
    offload: Literal["none", "cpu"] = setting("none", resume=Resume.FREE)
    """Device that holds the optimizer states (ZeRO stage 1 to 3)."""


@dataclass(frozen=True)
class TrainConfig:
    total_images: int = setting(1_000_000, at_least(1))
    """Images to train on, repeats included."""
    global_batch: int = setting(64, at_least(2))
    """Images per step, over all ranks and micro-batches."""
    seed: int = 0
    """Random seed. Weights, sample order, captions, noise and augmentation depend only on it and the images seen."""
    init: str = setting("", resume=Resume.FREE)  # read once, when the run starts
    """Run folder or exported model from which the run starts, on any set: the weights are the model's, its tokens keep
    their embeddings, and the tokens that only the new set has are added. Empty: random weights. Read at the start only."""
    hang_seconds: float = setting(600.0, resume=Resume.FREE)
    """A longer step counts as hung: the run names the rank that hangs and exits with status 77. 0 waits forever."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_images: int = setting(50_000, at_least(1))
    """Images between two checkpoints."""
    keep_last: int = setting(2, at_least(1))
    """Number of newest checkpoints to keep; at least 1."""
    keep_every_images: int = 0
    """Images between further checkpoints that are kept; 0 keeps only the newest checkpoints."""
    mirror: str = ""
    """Folder or URL (`s3://bucket/runs/mine`) to which a process started by rank 0 copies checkpoints, and from which a
    run can be restored; empty: no mirror. Each run needs its own mirror. Credentials come from the environment."""


@dataclass(frozen=True)
class ReportConfig:
    every_steps: int = setting(20, at_least(1))
    """Steps between two lines of metrics.jsonl (and of the log, if the output is not a terminal)."""
    sample_every_images: int = setting(20_000, at_least(1))
    """Images between two sample grids."""
    sample_prompts: tuple[str, ...] = ()
    """Captions of the sample grid; empty: captions of the held-out set, or of the training set."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: `offline` writes RUN/wandb for a later `wandb sync`, `online` also uploads."""
    wandb_project: str = "dist_t2i"
    """Weights & Biases project of the run."""


@dataclass(frozen=True)
class EvalConfig:
    """Scores during training (see docs/evaluation.md)."""

    every_images: int = 0
    """Images between two evaluations of the moving average by rank 0; the run ends with one. 0: no evaluation."""
    protocol: str = "quick"
    """Name of a protocol, or a .yaml file. Choose a small protocol, because training waits for the evaluation."""
    data: str = ""
    """Set that has the held-out split; empty: the set of data.train."""
    metric: str = "kid"
    """The score that selects the best checkpoint, on the protocol's first split."""


@dataclass(frozen=True)
class RunConfig:
    folder: str = ""
    """Run folder; empty: runs/<name of the config file>."""
    name: str = ""
    """Name shown in reports and Weights & Biases; empty: the folder's name."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = section(RunConfig, Resume.FREE)
    data: DataConfig = section(DataConfig)
    text: TextConfig = section(TextConfig, Resume.FIXED)
    model: ModelConfig = section(ModelConfig, Resume.FIXED)
    edit: EditConfig = section(EditConfig)
    loss: LossConfig = section(LossConfig)
    augment: AugmentConfig = section(AugmentConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    ema: EmaConfig = section(EmaConfig)
    engine: EngineConfig = section(EngineConfig)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, Resume.FREE)
    report: ReportConfig = section(ReportConfig, Resume.FREE)
    eval: EvalConfig = section(EvalConfig, Resume.FREE)
