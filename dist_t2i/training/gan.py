"""One training step of both networks: the table of gradient flows, as code.

    loss                                                      computed on                      updates
    D adversarial: hinge on real, fake, real + wrong caption  D(x, S_D)                        D, S_D
    D alignment: InfoNCE of real pictures and captions        align(x) . S_D                   D, S_D
    D penalty: R1, MA-GP or finite-difference R1              D(x, S_D as a constant)          D
    G adversarial                                             D(G(z, S_G), S_D as a constant)  G, S_G
    G alignment: InfoNCE of fakes with S_D, and with reals    align(G(z, S_G))                 G, S_G
    conditioning augmentation KL                              S_G                              G, S_G
    G pixels, where loss.pixels says so (our own)             G(z, S_G)                        G, S_G
    G pixels, where source pictures are edited                G(z, S_G, source)                G, S_G

Where pictures are edited (edit.width), G is the generator with its encoder of the source picture, and all that is said
of fakes is said of edits: they are judged against their new caption and its real picture.

With one micro-batch a step nothing is computed twice: the fakes of the D step carry the graph that the G step follows,
and the G step compares them with the embeddings that the D step made of real pictures and captions (one D update old:
our reading). With several, every micro-batch is embedded once without a graph first, so that InfoNCE always sees the
whole global batch (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_t2i.config import Config
from dist_t2i.config.sections import LossConfig
from dist_t2i.data.images import to_unit
from dist_t2i.data.stream.batch import Batch
from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.losses import functional as losses
from dist_t2i.losses.alignment import Negatives, discriminator_terms, generator_terms
from dist_t2i.losses.global_batch import GlobalRows, global_same_pairs
from dist_t2i.models.augmentation import augment
from dist_t2i.models.discriminator import Discriminator, Embeddings, Features
from dist_t2i.models.generator import Generated
from dist_t2i.models.networks import DiscriminatorSide
from dist_t2i.training.noise import Draws, draw, draw_pixels, draw_places
from dist_t2i.training.schedule import penalty_scale
from dist_t2i.training.shared_text import GivenText, OwnText, SharedText


@dataclass
class MicroBatch:
    """One rank's rows of one micro-batch, on the device, with the random numbers that belong to them."""

    index: int
    batch: Batch
    draws: Draws
    real: Tensor
    """[m, 3, H, W] in [-1, 1], augmented"""
    source: Tensor | None = None
    """[m, 3, H, W] in [-1, 1], where pictures are edited"""
    text_g: OwnText = field(default_factory=OwnText)
    fake: Generated | None = None
    sentence: Tensor | None = None
    """S_D [m, E] as the D step made it, without its graph"""


class Judged(NamedTuple):
    """What D says of one micro-batch's real pictures and fakes. Logits [m], or [m, L] where D judges places too."""

    real: Tensor
    fake: Tensor
    mismatched: Tensor
    sentence: Tensor
    embeddings: Embeddings
    penalty: Tensor


class Gan:
    """The engines and the rules between them. `text` is the shared encoder's engine, `frozen` a given encoder."""

    def __init__(
        self,
        config: Config,
        generator: NetworkEngine,
        discriminator: NetworkEngine,
        text: NetworkEngine | None = None,
        frozen: nn.Module | None = None,
    ):
        self.config = config
        self.generator, self.discriminator, self.text, self.frozen = generator, discriminator, text, frozen
        self._metrics: dict[str, Tensor] = {}

    @property
    def engines(self) -> list[NetworkEngine]:
        """All engines, in the order in which every rank makes collective calls on them."""
        return [e for e in (self.generator, self.discriminator, self.text) if e is not None]

    def step(self, batches: Sequence[Batch], images: int, rate_scale: float) -> dict[str, Tensor]:
        """One update of every network, from this rank's micro-batches of the step that begins at `images` seen.

        Returns metrics as fp32 scalars: this rank's mean over its rows, and global gradient norms. Collective.
        """
        self._metrics = {}
        negatives = self._negatives(batches, images)
        micros = [self._prepare(index, batch) for index, batch in enumerate(batches)]
        real = self._discriminator_step(micros, negatives, images, rate_scale)
        self._generator_step(micros, negatives, real, rate_scale)
        for engine in self.engines:
            self._metrics[f"grad/{engine.name}"] = torch.tensor(engine.gradient_norm)
        return self._metrics

    # ---- the discriminator and S_D -----------------------------------------------------------------------------------

    def _discriminator_step(
        self, micros: list[MicroBatch], negatives: Negatives, images: int, rate_scale: float
    ) -> GlobalRows:
        """Updates D and S_D. Returns the embeddings of all real pictures and captions of the global batch."""
        kind = self._penalty_kind(images)
        rows = GlobalRows(len(micros))
        single = len(micros) == 1
        for micro in [] if single else micros:
            rows.put(micro.index, self._embed_real(micro))
        for micro in micros:
            with torch.set_grad_enabled(single):
                self._generate(micro)
            text = self._text(micro, self.discriminator)
            judged = self.discriminator.module(lambda side, m=micro, t=text: self._judge(side, m, t, kind))
            micro.sentence = judged.sentence.detach()
            if single:
                rows.put(0, judged.embeddings)
            self.discriminator.backward(self._discriminator_loss(micro, judged, rows, negatives))
            text.carry(self.discriminator, rate_scale)
            self.discriminator.step(rate_scale)
        return rows

    def _penalty_kind(self, images: int) -> str:
        """The penalty of the step that begins at `images` seen; `none` on the steps that lazy regularisation skips."""
        step = images // self.config.train.global_batch
        return self.config.loss.penalty if penalty_scale(step, self.config.loss) else "none"

    def _judge(self, side: DiscriminatorSide, micro: MicroBatch, text: OwnText, kind: str) -> Judged:
        """All that D's losses need of one micro-batch, from one pass through D's trunk."""
        d, real = side.discriminator, micro.real
        fake = self._augment(micro.fake.images.detach(), micro)
        encoded = side.encode(micro.batch.tokens, micro.batch.lengths, text.embedding)
        sentence = encoded.sentence
        if kind in ("r1", "ma_gp"):  # apart, so that the second derivative does not drag the fakes along
            real = real.detach().requires_grad_(True)
            real_features, fake_features = d.features(real), d.features(fake)
        else:
            both = d.features(torch.cat([real, fake]))
            real_features, fake_features = both.rows(0, len(real)), both.rows(len(real), 2 * len(real))
        return Judged(
            real=d.adversarial(real_features, sentence),
            fake=d.adversarial(fake_features, sentence),
            mismatched=d.adversarial(real_features, _swap_partners(sentence)),
            sentence=sentence,
            embeddings={**d.embed_pictures(real_features), **d.embed_captions(encoded)},
            penalty=self._penalty(kind, d, micro, real, real_features, sentence.detach()),
        )

    def _penalty(
        self, kind: str, d: Discriminator, micro: MicroBatch, real: Tensor, features: Features, sentence: Tensor
    ) -> Tensor:
        """The penalty on real pictures with their captions. S_D is a constant in it, so it shapes D alone."""
        if kind == "none":
            return real.new_zeros((), dtype=torch.float32)
        if kind == "r1":
            return losses.r1(d.adversarial(features, sentence), real)
        if kind == "ma_gp":
            sentence.requires_grad_(True)
            return losses.ma_gp(d.adversarial(features, sentence), real, sentence)
        sigma = self.config.loss.penalty_sigma
        pixels = draw_pixels(self.config, micro.batch.positions, real.shape[-1]).to(real)
        perturbed = d.adversarial(d.features(real + sigma * pixels), sentence)
        return losses.fd_r1(d.adversarial(features, sentence), perturbed, sigma)

    def _discriminator_loss(self, micro: MicroBatch, judged: Judged, rows: GlobalRows, negatives: Negatives) -> Tensor:
        weights = self.config.loss
        # A wrong caption that is right by chance is no negative: its logit is put where the hinge is flat.
        right = _right_by_chance(micro.batch).view(-1, *[1] * (judged.mismatched.dim() - 1))
        mismatched = judged.mismatched.masked_fill(right, -1.0)
        adversarial = losses.hinge_d(judged.real, judged.fake, mismatched, weights.mismatched)
        alignment = discriminator_terms(rows.with_own(micro.index, judged.embeddings), weights, negatives)
        terms = {"loss/d_adversarial": adversarial, **_named(alignment)}
        over_rows, over_batch = adversarial, _weighted(alignment, weights)
        if judged.penalty.requires_grad:
            over_rows = over_rows + penalty_scale(0, weights) * judged.penalty
            terms["loss/d_penalty"] = judged.penalty
        logits = {f"logit/{name}": getattr(judged, name).float().mean() for name in ("real", "fake", "mismatched")}
        self._record({"loss/d": over_rows + over_batch, **terms, **logits}, rows)
        return over_rows + rows.share * over_batch

    # ---- the generator and S_G ---------------------------------------------------------------------------------------

    def _generator_step(
        self, micros: list[MicroBatch], negatives: Negatives, real: GlobalRows, rate_scale: float
    ) -> None:
        fakes = GlobalRows(len(micros))
        single = len(micros) == 1
        with self.discriminator.frozen():
            for micro in [] if single else micros:
                with torch.no_grad():
                    fakes.put(micro.index, self._judge_fake(micro)[1])
            for micro in micros:
                if not single:
                    self._generate(micro)
                logits, embeddings = self._judge_fake(micro)
                if single:
                    fakes.put(0, embeddings)
                self.generator.backward(self._generator_loss(micro, logits, embeddings, fakes, real, negatives))
                micro.text_g.carry(self.generator, rate_scale)
                self.generator.step(rate_scale)
                micro.fake = None

    def _judge_fake(self, micro: MicroBatch) -> tuple[Tensor, Embeddings]:
        """D's logits [m] and embeddings of a micro-batch's fakes, with whatever graph the fakes have."""
        fake = self._augment(micro.fake.images, micro)

        def judge(side: DiscriminatorSide) -> tuple[Tensor, Embeddings]:
            features = side.discriminator.features(fake)
            return side.discriminator.adversarial(features, micro.sentence), side.discriminator.embed_pictures(features)

        return self.discriminator.module(judge)

    def _generator_loss(
        self,
        micro: MicroBatch,
        logits: Tensor,
        embeddings: Embeddings,
        fakes: GlobalRows,
        real: GlobalRows,
        negatives: Negatives,
    ) -> Tensor:
        weights = self.config.loss
        adversarial = losses.hinge_g(logits)
        kl = losses.kl_condition(micro.fake.mean, micro.fake.log_variance)
        alignment = generator_terms(fakes.with_own(micro.index, embeddings), real.constants, weights, negatives)
        over_rows, over_batch = adversarial + weights.kl * kl, _weighted(alignment, weights)
        std = micro.fake.images.detach().float().std(dim=0, correction=0).mean()
        terms = {"loss/g_adversarial": adversarial, **_named(alignment), "loss/kl": kl, "fake/std": std}
        for name, weight, error in self._pixel_errors(micro):
            terms[name] = error
            over_rows = over_rows + weight * error
        self._record({"loss/g": over_rows + over_batch, **terms}, fakes)
        return over_rows + fakes.share * over_batch

    def _pixel_errors(self, micro: MicroBatch) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of what compares fakes with the real pictures of their captions, pixel by pixel: all of
        them; edits whose source was the real picture itself; edits whose source was another one."""
        weights, batch, fake = self.config.loss, micro.batch, micro.fake.images
        wanted = _pixels(batch.images, fake.dtype)
        if weights.pixels:
            yield "loss/g_pixels", weights.pixels, losses.pixel_error(fake, wanted, torch.ones_like(batch.image_ids))
        if micro.source is not None:
            own = batch.source_ids == batch.image_ids
            other = ~own & (batch.source_ids >= 0)
            yield "loss/g_reconstruction", weights.reconstruction, losses.pixel_error(fake, wanted, own)
            yield "loss/g_edit_target", weights.edit_target, losses.way_left(fake, micro.source, wanted, other)

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _prepare(self, index: int, batch: Batch) -> MicroBatch:
        device = self.discriminator.device
        draws = Draws(*(t.to(device) for t in draw(self.config, batch.positions)))
        batch = batch.to(device)
        real = augment(_pixels(batch.images, self.discriminator.dtype), draws.augmentation, self.config.augment)
        source = _pixels(batch.sources, self.generator.dtype) if self.config.edit.width else None
        return MicroBatch(index, batch, draws, real, source)

    def _negatives(self, batches: Sequence[Batch], images: int) -> Negatives:
        """What the rows of this step are contrasted with. Collective."""
        places, device = draw_places(self.config, images), self.generator.device
        same = global_same_pairs([batch.to(device) for batch in batches])
        return Negatives(same, None if places is None else places.to(device))

    def _augment(self, images: Tensor, micro: MicroBatch) -> Tensor:
        """A fake as D sees it: shifted, coloured and cut like the real picture of its caption."""
        return augment(images.to(self.discriminator.dtype), micro.draws.augmentation, self.config.augment)

    def _text(self, micro: MicroBatch, engine: NetworkEngine) -> OwnText:
        tokens, lengths = micro.batch.tokens, micro.batch.lengths
        if self.frozen is not None:
            return GivenText(self.frozen, tokens, lengths, engine)
        return OwnText() if self.text is None else SharedText(self.text, tokens, lengths)

    def _generate(self, micro: MicroBatch) -> None:
        """Fakes for the micro-batch's captions, with a graph unless gradients are off."""
        micro.text_g = self._text(micro, self.generator)
        noise, condition_noise, _ = micro.draws
        dtype, batch = self.generator.dtype, micro.batch
        text = (batch.tokens, batch.lengths, micro.text_g.embedding)
        sources = () if micro.source is None else (micro.source, batch.source_ids >= 0)
        micro.fake = self.generator.module(noise.to(dtype), condition_noise.to(dtype), *text, *sources)

    @torch.no_grad()
    def _embed_real(self, micro: MicroBatch) -> Embeddings:
        text = self._text(micro, self.discriminator)

        def embed(side: DiscriminatorSide) -> Embeddings:
            d, encoded = side.discriminator, side.encode(micro.batch.tokens, micro.batch.lengths, text.embedding)
            return {**d.embed_pictures(d.features(micro.real)), **d.embed_captions(encoded)}

        return self.discriminator.module(embed)

    def _record(self, terms: dict[str, Tensor], rows: GlobalRows) -> None:
        for name, value in terms.items():
            mean = value.detach().float() / rows.micro_batches
            self._metrics[name] = self._metrics[name] + mean if name in self._metrics else mean


def _pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [m, 3, H, W] as the networks see it, in [-1, 1]."""
    return to_unit(images.contiguous(memory_format=torch.channels_last), dtype)


def _named(alignment: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms by the names of their metrics."""
    return {f"loss/{name}": value for name, value in alignment.items()}


def _weighted(alignment: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """The sum of the terms, each with the weight of its name."""
    return sum(getattr(weights, name) * value for name, value in alignment.items())


def _swap_partners(rows: Tensor) -> Tensor:
    """[m, ...] with rows 2k and 2k + 1 exchanged: each picture meets its neighbour's caption, on its own rank."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _right_by_chance(batch: Batch) -> Tensor:
    """bool [m]: the neighbour shows the same picture or has the same caption."""
    return (batch.image_ids == _swap_partners(batch.image_ids)) | (
        batch.caption_ids == _swap_partners(batch.caption_ids)
    )
