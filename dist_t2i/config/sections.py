"""The configuration of a run as frozen dataclasses. YAML replaces defaults, `section.key=value` overrides replace YAML.

The string beneath a field documents the field's key, and `--help-config` prints this string. The `setting` of a field
states the range of the key, and whether the key may change on resume. Unless a key says otherwise, sizes are in pixels
and durations in images seen.
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
"""Maps the name of a key in earlier versions to the present name. Files and overrides may use both names."""


@dataclass(frozen=True)
class DataConfig:
    # The key is FREE, because a set may move: on resume, the sets' fingerprints are compared instead of their paths.
    train: str | tuple[str, ...] = setting("", resume=Resume.FREE)
    """Training set: a folder or URL with manifest.json, or WebDataset tars as a glob or as a URL with braces, such as
    `s3://bucket/coco/train-{000000..000591}.tar`. A list mixes several sets."""
    weights: tuple[float, ...] = setting((), POSITIVE)
    """Relative sampling frequency of each entry of `train`. By default, every picture is used once per epoch."""
    image_size: int = setting(64, Bounds(32, 4096), Resume.FIXED)
    """Side of the square training pictures in pixels: a power of two, at least 32."""
    workers: int = setting(1, resume=Resume.FREE)
    """Loader processes per rank. With 0, the training process decodes the pictures."""
    shuffle_window: int = setting(16_384, at_least(1))
    """Samples per shuffle window. A reader has about two shuffle windows in memory."""
    shuffle_shards: int = setting(16, at_least(1))
    """Number of shards from which a shuffle window takes its samples."""
    flip: bool = True
    """Whether pictures are mirrored with probability 1/2, as a function of the seed and the images seen."""
    crop: float = setting(1.0, Bounds(0, 1, above=True))
    """Smallest share of the short side that a random crop keeps. With 1, the crop is the central square."""
    max_tokens: int = setting(32, Bounds(2, 4096), Resume.FIXED)
    """Maximum number of tokens of a caption, after which the caption is truncated."""
    on_bad: Literal["budget", "strict"] = setting("budget", resume=Resume.FREE)
    """Reaction to a sample that cannot be used: `budget` replaces and counts the sample, `strict` stops the run."""
    max_bad_fraction: float = setting(0.01, SHARE, Resume.FREE)
    """With `budget`, largest share of replaced samples among the images seen, above which the run stops."""
    retry_seconds: float = setting(300.0, resume=Resume.FREE)
    """Seconds for which a failed remote read is retried before the sample counts as bad."""
    stall_seconds: float = setting(10.0, POSITIVE, Resume.FREE)
    """Seconds without data after which a remote read fails. A complete read may take six times as many seconds."""
    cache: str = setting("auto", resume=Resume.FREE)
    """Folder on the local disk that caches parts of remote shards for all processes of this machine. `auto` is a folder
    in the temporary folder of the job or the system. With `none`, each sample needs its own request."""
    cache_gb: float = setting(20.0, resume=Resume.FREE)
    """Largest size of the cache, in GB."""
    endpoint: str = setting("", resume=Resume.FREE)
    """URL of an S3-compatible server (default: AWS_ENDPOINT_URL, or AWS). Credentials come from the environment."""
    region: str = setting("", resume=Resume.FREE)
    """Region of the bucket (default: AWS_REGION)."""
    anonymous: bool = setting(False, resume=Resume.FREE)
    """Whether requests are unsigned, for public buckets."""


@dataclass(frozen=True)
class EditConfig:
    """Text-guided editing of a source picture, which `width` turns on."""

    width: int = setting(0, resume=Resume.FIXED)
    """Channels of the source encoder at every scale. With 0, pictures come from texts only, without editing."""
    init: str = setting("", resume=Resume.FREE)  # read once, when the run starts
    """Run folder or exported model that gives the initial weights (default: random weights). Read only at the start."""
    own: float = setting(0.3, SHARE)
    """Share of the samples whose source is their own picture, which the generator must reproduce."""
    none: float = setting(0.1, SHARE)
    """Share of the samples that are generated from their text alone, without a source. The remaining samples, neither
    `own` nor `none`, edit the picture of a sample with a near caption."""
    words: int = setting(4, at_least(1))
    """Two captions are near when they differ only in one group of at most this many consecutive words."""


@dataclass(frozen=True)
class LossConfig:
    """Weights and temperatures of the losses. An alignment term (losses/alignment.py) has the name of its weight."""

    d_alignment: float = 1.0
    """Weight of D's InfoNCE between real pictures and their captions."""
    d_alignment_regions: float = 1.0
    """Weight of D's InfoNCE between captions and the positions of D's region maps (no effect without region maps)."""
    g_alignment_text: float = setting(2.0, earlier=1.0)
    """Weight of G's InfoNCE between G's pictures and S_D of their captions."""
    g_alignment_image: float = setting(0.0, earlier=1.0)
    """Weight of G's InfoNCE between G's pictures and the real pictures of the same captions. Use this loss for sets whose
    captions determine most of the picture, such as drawings: it asks for one picture per caption."""
    g_alignment_regions: float = setting(0.0, earlier=1.0)
    """Weight of G's InfoNCE between G's pictures and the real pictures, at each position of D's region maps. Like
    `g_alignment_image`, it suits drawings."""
    temperature: float = setting(0.1, POSITIVE)
    """Temperature of the InfoNCE losses on whole pictures and sentences."""
    region_negatives: int = 0
    """Number of other positions in a fake's region map that are negatives for each position, in addition to the same
    position in other pictures. These negatives provide a gradient where all pictures look alike, as on plain
    backgrounds."""
    region_temperature: float = setting(0.1, POSITIVE)
    """Temperature of the InfoNCE losses on regions."""
    d_alignment_words: float = 1.0
    """Weight of D's InfoNCE between real pictures and their captions' words (no effect without discriminator.words)."""
    g_alignment_words: float = setting(2.0, earlier=1.0)
    """Weight of G's InfoNCE between G's pictures and S_D's words of their captions."""
    word_temperature: float = setting(0.1, POSITIVE)
    """Temperature of the InfoNCE losses on words."""
    word_sharpness: float = setting(5.0, POSITIVE)
    """Inverse temperature of a word's attention to regions and of the pooling over words (AttnGAN: gamma 1 and 2)."""
    g_mode_seeking: float = setting(0.5, NOT_NEGATIVE, absent=0.0)
    """Weight of G's mode seeking (`losses.mode_seeking`): two pictures of one caption must differ in D's features, so
    that G does not ignore the noise."""
    mismatched: float = setting(0.5, SHARE)
    """Weight of real pictures with wrong captions among the negatives of D's hinge loss."""
    mismatched_group: int = setting(2, at_least(2), absent=2)
    """Number of consecutive rows among which a real picture gets its wrong caption: the one that D's alignment finds
    most similar to the picture. With 2, it is always the caption of the neighboring row. A micro-batch on a rank must
    consist of whole groups."""
    pixels: float = 0.0
    """Weight of G's mean absolute error (pixels in [-1, 1]) against the real pictures of its captions. Use this loss
    for sets whose captions determine most of the picture, such as drawings. The loss blurs every other detail."""
    reconstruction: float = 10.0
    """Weight of G's mean absolute error (pixels in [-1, 1]) on edits of a picture into itself (`edit.own`)."""
    edit_target: float = 0.0
    """Weight of the squared distance between G's picture and the target, divided by the squared distance between source
    and target (`losses.way_left`). This loss applies to samples whose source is another sample's picture. Use the loss
    only for sets such as drawings, in which pictures with near captions have equal pixels except where the captions
    differ."""
    kl: float = setting(0.005, earlier=0.02)
    """Weight of the conditioning augmentation's KL divergence."""
    penalty: Literal["none", "r1", "ma_gp", "fd_r1"] = "r1"
    """D's gradient penalty: none, R1, DF-GAN's matching-aware penalty, or R1 by finite differences (any ZeRO stage)."""
    penalty_weight: float = 0.05
    """Weight of the penalty. For R1, the weight multiplies the squared gradient norm, without a factor of 1/2."""
    penalty_every: int = setting(8, at_least(1))
    """Every n-th step has the penalty, with n times the weight (StyleGAN2, sec. 3.1: lazy regularization)."""
    penalty_sigma: float = setting(0.0, earlier=0.01)
    """Step of the finite difference in `fd_r1`, for pixels in [-1, 1]. 0: 0.01 in fp32, 0.03 in fp16 and 0.1 in bf16,
    because a difference of logits must be larger than their rounding errors."""


@dataclass(frozen=True)
class OptimizerConfig:
    generator_matrices: Literal["adamw", "muon"] = setting("adamw", resume=Resume.FIXED)
    """Optimizer of the generator's matrices and kernels. The generator's biases and text encoder always use AdamW."""
    generator_lr: float = setting(5e-4, POSITIVE, earlier=8e-4)
    """Peak learning rate of the generator."""
    discriminator_lr: float = setting(5e-4, POSITIVE, earlier=8e-4)
    """Peak learning rate of the discriminator."""
    text_lr_scale: float = 1.0
    """Learning rate of a text encoder, divided by the learning rate of the encoder's engine."""
    beta1: float = setting(0.0, Bounds(0, 1, below=True))
    """Adam's first-moment decay."""
    beta2: float = setting(0.99, Bounds(0, 1, below=True))
    """Adam's second-moment decay."""
    epsilon: float = setting(1e-8, POSITIVE)
    """AdamW's epsilon, which is added to the root of the second moment."""
    muon_momentum: float = 0.9
    """Decay of Muon's moving average of gradients."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_images: int = 2_000
    """Images over which the learning rates rise linearly from 0. With 0, the rates start at their peak."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rates' decay, which begins at `decay_start`."""
    decay_start: float = setting(0.5, SHARE)
    """Share of train.total_images after which the decay begins."""
    final_lr_scale: float = setting(0.0, SHARE)
    """Learning rates at the end of training, divided by the peak learning rates."""
    gradient_clipping: float = setting(1.0, earlier=0.0)
    """Largest global gradient norm of each engine, beyond which the gradient is scaled down. 0 turns clipping off."""


@dataclass(frozen=True)
class EmaConfig:
    half_life_images: int = setting(10_000, at_least(1))
    """Images after which a weight's share in the moving average has halved."""
    ramp: float = setting(0.05, SHARE)
    """Largest half-life early in training, as a share of the images seen (EDM, sec. F.2: EMA warm-up)."""


@dataclass(frozen=True)
class EngineConfig:
    generator_stage: Literal[0, 1, 2, 3] = setting(0, resume=Resume.FREE)
    """ZeRO stage of the engine that holds the generator and its text encoder."""
    discriminator_stage: Literal[0, 1, 2, 3] = setting(0, resume=Resume.FREE)
    """ZeRO stage of the discriminator's engine. Stage 3 needs loss.penalty fd_r1 or none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format. `auto` is bf16 if the processor or GPU computes bf16 natively, and fp32 otherwise."""
    accumulation: int = setting(1, at_least(1), Resume.FREE)
    """Micro-batches per step and rank, into which the global batch is divided."""
    offload: Literal["none", "cpu"] = setting("none", resume=Resume.FREE)
    """Device to which the optimizer states are offloaded (ZeRO stage 1 to 3)."""


@dataclass(frozen=True)
class TrainConfig:
    total_images: int = setting(1_000_000, at_least(1))
    """Number of images seen in the full training, including repeats."""
    global_batch: int = setting(16, at_least(2), earlier=64)
    """Images per step, over all ranks and micro-batches."""
    seed: int = 0
    """Random seed. Weights, order of samples, captions, noise and augmentation depend only on seed and images seen."""
    init: str = setting("", resume=Resume.FREE)  # read once, when the run starts
    """Run folder or exported model that gives the initial weights and token embeddings (default: random weights). The
    data set may be another set, whose new tokens are added. Read only at the start."""
    on_divergence: Literal["stop", "rewind", "warn"] = setting("stop", resume=Resume.FREE)
    """What follows when training diverges (docs/checkpoints.md): `stop` ends the run at its last healthy checkpoint;
    `rewind` continues from there with half the learning rates, at most three times; `warn` only prints a warning."""
    divergence_images: int = setting(5_000, at_least(1), Resume.FREE)
    """Images for which signs of divergence must hold before `on_divergence` applies; at least 32 steps pass."""
    hang_seconds: float = setting(600.0, resume=Resume.FREE)
    """Time after which a step counts as hung: the run names the hanging rank and exits with status 77 (0: never)."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_images: int = setting(50_000, at_least(1))
    """Images between two checkpoints."""
    keep_last: int = setting(2, at_least(1))
    """Number of newest checkpoints that are kept, at least 1."""
    keep_every_images: int = 0
    """Images between older checkpoints that are also kept. With 0, only the newest checkpoints are kept."""
    mirror: str = ""
    """Folder or URL (`s3://bucket/runs/mine`) to which checkpoints are copied, and from which a run can be restored
    (default: no mirror). Each run needs its own mirror. Credentials come from the environment."""


@dataclass(frozen=True)
class ReportConfig:
    every_steps: int = setting(20, at_least(1))
    """Steps between two lines of metrics.jsonl, and of the log if the output is not a terminal."""
    sample_every_images: int = setting(20_000, at_least(1))
    """Images between two sample grids."""
    sample_prompts: tuple[str, ...] = ()
    """Captions of the sample grid (default: captions of the held-out set, or of the training set)."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: `offline` writes RUN/wandb for a later `wandb sync`, and `online` also uploads this folder."""
    wandb_project: str = "dist_t2i"
    """Weights & Biases project of the run."""


@dataclass(frozen=True)
class EvalConfig:
    """Scores during training (see docs/evaluation.md)."""

    every_images: int = 0
    """Images between two evaluations of the moving average by rank 0 (0: none). The run also ends with an
    evaluation."""
    protocol: str = "quick"
    """Name of a protocol, or a .yaml file. Choose a small protocol, because training waits for the evaluation."""
    data: str = ""
    """Set with the held-out split (default: the set of data.train)."""
    metric: str = "kid"
    """The score that selects the best checkpoint, on the protocol's first split."""


@dataclass(frozen=True)
class RunConfig:
    folder: str = ""
    """Run folder (default: runs/<name of the config file>)."""
    name: str = ""
    """Name in reports and Weights & Biases (default: the folder's name)."""


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
