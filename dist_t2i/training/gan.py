"""One training step of both networks. Which loss trains what:

    loss                                                      computed on                      updates
    D adversarial: hinge on real, fake, real + wrong caption  D(x, S_D)                        D, S_D
    D alignment: InfoNCE of real pictures and captions        align(x) . S_D                   D, S_D
    D penalty: R1, MA-GP or finite-difference R1              D(x, S_D as a constant)          D
    G adversarial                                             D(G(z, S_G), S_D as a constant)  G, S_G
    G alignment: InfoNCE of fakes with S_D, and with reals    align(G(z, S_G))                 G, S_G
    G mode seeking: two fakes of a caption (our own)          D's trunk of G(z, S_G)           G, S_G
    conditioning augmentation KL                              S_G                              G, S_G
    G pixels, if loss.pixels is set (not in the paper)        G(z, S_G)                        G, S_G
    G pixels, if source pictures are edited                   G(z, S_G, source)                G, S_G

If the run trains edits (edit.width), G includes the encoder of the source pictures. D compares an edited picture with
the new caption and with the real picture of this caption.

With one micro-batch per step, nothing is computed twice: G's step backpropagates through the fakes that D's step
generated. G's step compares these fakes with the embeddings that D computed before its update (our reading). With
several micro-batches per step, a pass without gradients first embeds all micro-batches, so that InfoNCE sees the whole
global batch (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size").

Legend of shapes: m rows of a micro-batch on this rank, B rows of the global batch, E text width, H W pixels, L logits
per picture (more than one if D has a patch head).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_t2i.config.sections import EditConfig, LossConfig, TrainConfig
from dist_t2i.data.images import to_unit
from dist_t2i.data.stream.batch import Batch
from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.losses import functional as losses
from dist_t2i.losses.alignment import Negatives, discriminator_terms, generator_terms, wrong_captions
from dist_t2i.losses.global_batch import GlobalRows, global_same_pairs
from dist_t2i.models.augmentation import augment
from dist_t2i.models.config import AugmentConfig, ModelConfig
from dist_t2i.models.discriminator import Discriminator, Embeddings, Features
from dist_t2i.models.generator import Generated
from dist_t2i.models.networks import DiscriminatorSide
from dist_t2i.training.noise import RowNoise, perturbation, region_negatives, row_noise, second_noise
from dist_t2i.training.schedule import penalty_scale
from dist_t2i.training.text_modes import FrozenText, PerNetworkText, SharedText


class Source(NamedTuple):
    """The pictures that a micro-batch edits."""

    images: Tensor  # [m, 3, H, W] in [-1, 1]
    ids: Tensor  # int64 [m]; -1 for rows without a source


@dataclass
class MicroBatch:
    """One rank's rows of one micro-batch, on the device, with their random numbers."""

    index: int
    batch: Batch
    noise: RowNoise
    real: Tensor  # [m, 3, H, W] in [-1, 1], augmented
    source: Source | None  # None if no pictures are edited
    text_g: PerNetworkText = field(init=False)  # S_G, from which the fakes were generated
    fake: Generated = field(init=False)
    second: Tensor | None = field(init=False, default=None)  # [m / 2, 3, H, W], second fakes of every other row
    sentence: Tensor = field(init=False)  # S_D [m, E] as computed in D's step, detached from the graph


class DiscriminatorOutput(NamedTuple):
    """D's outputs on the real pictures and fakes of one micro-batch. Logits are [m] or [m, L]."""

    real: Tensor
    fake: Tensor
    mismatched: Tensor  # logits of real pictures with the caption of another row
    matching: Tensor  # bool [m], pictures that this caption matches by chance
    sentence: Tensor
    embeddings: Embeddings
    penalty: Tensor


@dataclass(eq=False)
class Gan:
    """The training step over the engines of both networks."""

    generator: NetworkEngine
    discriminator: NetworkEngine
    text: NetworkEngine | None  # the engine of a shared encoder (text.mode=shared)
    frozen: nn.Module | None  # the given encoder (text.mode=frozen)
    loss: LossConfig
    augmentation: AugmentConfig
    model: ModelConfig
    train: TrainConfig
    edit: EditConfig
    _metrics: dict[str, Tensor] = field(init=False)  # of the current step
    _negatives: Negatives = field(init=False)

    @property
    def engines(self) -> list[NetworkEngine]:
        """All engines, in the order of collective calls, which is the same on every rank."""
        return [e for e in (self.generator, self.discriminator, self.text) if e is not None]

    def step(self, batches: Sequence[Batch], images: int, rate_scale: float) -> dict[str, Tensor]:
        """Update every network once, with this rank's micro-batches. `images` is the number seen before the step.

        `rate_scale` multiplies the peak learning rates. Returns metrics as fp32 scalars: this rank's means over its
        rows, and global gradient norms. Collective.
        """
        self._metrics, self._negatives = {}, self._find_negatives(batches, images)
        micros = [self._prepare(index, batch) for index, batch in enumerate(batches)]
        real = self._discriminator_step(micros, images, rate_scale)
        self._generator_step(micros, real, rate_scale)
        return self._metrics | {f"grad/{e.name}": torch.tensor(e.gradient_norm) for e in self.engines}

    # ---- the discriminator and S_D -----------------------------------------------------------------------------------

    def _discriminator_step(self, micros: list[MicroBatch], images: int, rate_scale: float) -> GlobalRows:
        """Update D and S_D; returns the embeddings of all real pictures and captions of the global batch, [B, ...]."""
        due = penalty_scale(images // self.train.global_batch, self.loss) > 0
        penalty = self.loss.penalty if due else "none"
        rows, single = GlobalRows(len(micros)), len(micros) == 1

        # With several micro-batches: embed the real pictures and captions of all micro-batches first, because every
        # loss needs the whole global batch.
        for micro in [] if single else micros:
            rows.put(micro.index, self._embed_real(micro))

        for micro in micros:
            # Fakes [m, 3, H, W] from S_G. Fakes keep their autograd graph only if G's step backpropagates through them.
            with torch.set_grad_enabled(single):
                self._generate(micro)

            # Evaluate D on reals and fakes, in one forward call of the engine. G's step takes S_D [m, E] as a constant.
            text = self._text(micro, self.discriminator)
            output = self.discriminator.module(partial(self._discriminate, micro, text, penalty))
            micro.sentence = output.sentence.detach()
            if single:
                rows.put(0, output.embeddings)

            # Gradients of D and S_D. A shared encoder gets a gradient through its own engine.
            self.discriminator.backward(self._discriminator_loss(micro, output, rows))
            text.propagate(self.discriminator, rate_scale)
            self.discriminator.step(rate_scale)
        return rows

    def _discriminate(
        self, micro: MicroBatch, text: PerNetworkText, penalty: str, side: DiscriminatorSide
    ) -> DiscriminatorOutput:
        """The inputs of D's losses for one micro-batch, computed in one pass through D's trunk."""
        d, real = side.discriminator, micro.real
        fake = self._augment(micro.fake.images.detach(), micro.noise.augmentation)
        encoded = side.encode(micro.batch.tokens, micro.batch.lengths, text.embedding)
        sentence = encoded.sentence

        # The trunk processes reals and fakes together, [2m, 3, H, W], unless the penalty is exact. Exact penalties (r1,
        # ma_gp) need the gradient with respect to the reals, so the reals pass through the trunk separately: the second
        # derivative must not include the fakes.
        if penalty in ("r1", "ma_gp"):
            real = real.detach().requires_grad_(True)
            real_features, fake_features = d.features(real), d.features(fake)
        else:
            both = d.features(torch.cat([real, fake]))
            real_features, fake_features = both.rows(0, len(real)), both.rows(len(real), 2 * len(real))

        # The heads: three kinds of logits [m] or [m, L], and the embeddings that InfoNCE compares.
        cosines = None
        if self.loss.mismatched_group > 2:
            with torch.no_grad():
                cosines = d.align_image(real_features) @ d.align_text(sentence).T
        pairs = losses.same_pairs(micro.batch.image_ids, micro.batch.caption_ids)
        wrong, matching = wrong_captions(cosines, pairs, self.loss.mismatched_group)
        return DiscriminatorOutput(
            real=d.adversarial(real_features, sentence),
            fake=d.adversarial(fake_features, sentence),
            mismatched=d.adversarial(real_features, sentence[wrong]),
            matching=matching,
            sentence=sentence,
            embeddings={**d.embed_pictures(real_features), **d.embed_captions(encoded)},
            penalty=self._penalty(penalty, d, micro, real, real_features, sentence.detach()),
        )

    def _penalty(
        self, kind: str, d: Discriminator, micro: MicroBatch, real: Tensor, features: Features, sentence: Tensor
    ) -> Tensor:
        """The penalty on real pictures with their captions. S_D is a constant, so only D gets a gradient."""
        if kind == "none":
            return real.new_zeros((), dtype=torch.float32)
        if kind == "r1":
            return losses.r1(d.adversarial(features, sentence), real)
        if kind == "ma_gp":
            sentence.requires_grad_(True)
            return losses.ma_gp(d.adversarial(features, sentence), real, sentence)
        sigma = self.loss.penalty_sigma or losses.FD_SIGMA[self.discriminator.dtype]
        pixels = perturbation(self.train.seed, micro.batch.positions, real.shape[-1]).to(real)
        perturbed = d.adversarial(d.features(real + sigma * pixels), sentence)
        return losses.fd_r1(d.adversarial(features, sentence), perturbed, sigma)

    def _discriminator_loss(self, micro: MicroBatch, output: DiscriminatorOutput, rows: GlobalRows) -> Tensor:
        weights = self.loss

        # Hinge over this rank's m rows. A picture may match the caption of another row by chance. The logit of a
        # matching pair is set to -1, where the hinge has no gradient.
        matching = output.matching.view(-1, *[1] * (output.mismatched.dim() - 1))
        mismatched = output.mismatched.masked_fill(matching, -1.0)
        adversarial = losses.hinge_d(output.real, output.fake, mismatched, weights.mismatched)

        # InfoNCE over the B rows of the global batch. Only the rows of this micro-batch have an autograd graph.
        embeddings = rows.with_own(micro.index, output.embeddings)
        named, over_batch = _named_and_weighted(discriminator_terms(embeddings, weights, self._negatives), weights)
        terms, over_rows = {"loss/d_adversarial": adversarial, **named}, adversarial
        if output.penalty.requires_grad:
            over_rows = over_rows + penalty_scale(0, weights) * output.penalty
            terms["loss/d_penalty"] = output.penalty
        logits = {f"logit/{name}": getattr(output, name).float().mean() for name in ("real", "fake", "mismatched")}
        self._record({"loss/d": over_rows + over_batch, **terms, **logits}, rows)

        # DeepSpeed averages gradients over ranks and micro-batches. Averaging is right for losses that are means over
        # rows. Gradients of losses over the global batch must be summed, so the factor `share` undoes the averaging.
        return over_rows + rows.share * over_batch

    # ---- the generator and S_G ---------------------------------------------------------------------------------------

    def _generator_step(self, micros: list[MicroBatch], real: GlobalRows, rate_scale: float) -> None:
        """Update G and S_G, but not D. `real` holds the embeddings that D's step computed."""
        fakes, single = GlobalRows(len(micros)), len(micros) == 1
        with self.discriminator.frozen():
            # With several micro-batches: embed all fakes without gradients first, for losses over the global batch.
            for micro in [] if single else micros:
                with torch.no_grad():
                    fakes.put(micro.index, self._discriminate_fakes(micro)[1])

            for micro in micros:
                # Regenerate the fakes of D's step with a graph. The fakes are the same, because G has not changed.
                if not single:
                    self._generate(micro)
                logits, embeddings, pooled = self._discriminate_fakes(micro)
                if single:
                    fakes.put(0, embeddings)

                # Gradients of G and S_G, through D with its updated weights.
                self.generator.backward(self._generator_loss(micro, logits, embeddings, pooled, fakes, real))
                micro.text_g.propagate(self.generator, rate_scale)
                self.generator.step(rate_scale)
                del micro.fake, micro.second

    def _discriminate_fakes(self, micro: MicroBatch) -> tuple[Tensor, Embeddings, Tensor]:
        """D's logits, [m] or [m, L], embeddings, and pooled features [m + m / 2, A] of a micro-batch's fakes and second
        fakes. Keeps the graph of the fakes, if any."""
        fake, rows = self._augment(micro.fake.images, micro.noise.augmentation), len(micro.fake.images)
        if micro.second is not None:
            # Augment second fakes like first fakes, so that both differ only because of the noise.
            fake = torch.cat([fake, self._augment(micro.second, micro.noise.augmentation[::2])])

        def discriminate(side: DiscriminatorSide) -> tuple[Tensor, Embeddings, Tensor]:
            every = (d := side.discriminator).features(fake)
            features = every.rows(0, rows)
            return d.adversarial(features, micro.sentence), d.embed_pictures(features), every.pooled

        return self.discriminator.module(discriminate)

    def _generator_loss(
        self,
        micro: MicroBatch,
        logits: Tensor,
        embeddings: Embeddings,
        pooled: Tensor,
        fakes: GlobalRows,
        real: GlobalRows,
    ) -> Tensor:
        weights, rows = self.loss, len(logits)

        # Over this rank's m rows: hinge, KL of the conditioning (StackGAN, eq. 2), and pixel errors if configured.
        adversarial = losses.hinge_g(logits)
        kl = losses.kl_condition(micro.fake.mean, micro.fake.log_variance)
        over_rows = adversarial + weights.kl * kl

        # Over the global batch: InfoNCE of fakes with captions and with real pictures. The embeddings of captions and
        # real pictures come from D's step and are constants here.
        alignment = generator_terms(fakes.with_own(micro.index, embeddings), real.constants, weights, self._negatives)
        named, over_batch = _named_and_weighted(alignment, weights)

        spreads = {**_spread("fake", micro.fake.images), **_spread("real", _unit(micro.batch.images, torch.float32))}
        terms = {"loss/g_adversarial": adversarial, **named, "loss/kl": kl, **spreads}
        if micro.second is not None:
            # Over every other row: two fakes of one caption, compared in D's features (our own form of mode seeking).
            pairs = pooled[:rows:2], pooled[rows:]
            terms["loss/g_mode_seeking"] = losses.mode_seeking(*pairs)
            terms["fake/diversity"] = losses.relative_diversity(*pairs)
            over_rows = over_rows + weights.g_mode_seeking * terms["loss/g_mode_seeking"]
        for name, weight, error in self._pixel_errors(micro):
            terms[name] = error
            over_rows = over_rows + weight * error
        self._record({"loss/g": over_rows + over_batch, **terms}, fakes)
        return over_rows + fakes.share * over_batch  # `share`: see `_discriminator_loss`

    def _pixel_errors(self, micro: MicroBatch) -> Iterator[tuple[str, float, Tensor]]:
        """Metric name, weight and value of each loss that compares fakes with the real pictures of their captions."""
        weights, batch, fake = self.loss, micro.batch, micro.fake.images
        target = _unit(batch.images, fake.dtype)
        if weights.pixels:
            yield "loss/g_pixels", weights.pixels, losses.pixel_error(fake, target, torch.ones_like(batch.image_ids))
        if micro.source is not None:
            # Rows whose source is the target must reproduce the target. Rows with another source must move towards the
            # target. Rows without a source have neither loss.
            same = micro.source.ids == batch.image_ids
            other = ~same & (micro.source.ids >= 0)
            yield "loss/g_reconstruction", weights.reconstruction, losses.pixel_error(fake, target, same)
            yield "loss/g_edit_target", weights.edit_target, losses.way_left(fake, micro.source.images, target, other)

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _prepare(self, index: int, batch: Batch) -> MicroBatch:
        """Move a batch and its random numbers to the device; augment the real pictures."""
        device = self.discriminator.device
        noise = row_noise(self.train.seed, batch.positions, self.model.generator)
        noise, batch = RowNoise(*(tensor.to(device) for tensor in noise)), batch.to(device)
        real = augment(_unit(batch.images, self.discriminator.dtype), noise.augmentation, self.augmentation)
        source = None
        if self.edit.width:
            assert batch.sources is not None and batch.source_ids is not None
            source = Source(_unit(batch.sources, self.generator.dtype), batch.source_ids)
        return MicroBatch(index, batch, noise, real, source)

    def _find_negatives(self, batches: Sequence[Batch], images: int) -> Negatives:
        device, sides = self.generator.device, self.model.discriminator.regions
        positions = region_negatives(self.train.seed, images, sides, self.loss.region_negatives)
        same = global_same_pairs([(b.image_ids.to(device), b.caption_ids.to(device)) for b in batches])
        return Negatives(same, None if positions is None else positions.to(device))

    def _augment(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """The fakes as D sees them, augmented with the random numbers of the real pictures for the same captions."""
        return augment(images.to(self.discriminator.dtype), uniforms, self.augmentation)

    def _text(self, micro: MicroBatch, engine: NetworkEngine) -> PerNetworkText:
        tokens, lengths = micro.batch.tokens, micro.batch.lengths
        if self.frozen is not None:
            return FrozenText(self.frozen, tokens, lengths, engine.dtype)
        return PerNetworkText() if self.text is None else SharedText(self.text, tokens, lengths)

    def _generate(self, micro: MicroBatch) -> None:
        micro.text_g = self._text(micro, self.generator)
        dtype, batch = self.generator.dtype, micro.batch
        noise, condition_noise = micro.noise.noise.to(dtype), micro.noise.condition_noise.to(dtype)
        text = (batch.tokens, batch.lengths, micro.text_g.embedding)
        source = (None, None) if micro.source is None else (micro.source.images, micro.source.ids >= 0)
        rows, count = None, len(noise)
        if self.loss.g_mode_seeking and torch.is_grad_enabled():
            # A second fake of every other row, from independent noise, in the same call of the engine.
            pairs = second_noise(self.train.seed, batch.positions[::2].cpu(), self.model.generator)
            noise, condition_noise = (
                torch.cat([first, second.to(first)])
                for first, second in zip((noise, condition_noise), pairs, strict=True)
            )
            rows = torch.arange(count, device=noise.device)
            rows = torch.cat([rows, rows[::2]])
        generated = self.generator.module(noise, condition_noise, *text, *source, rows)
        micro.fake = Generated(*(x[:count] for x in generated))
        micro.second = None if rows is None else generated.images[count:]

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


def _unit(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [m, 3, H, W] -> [-1, 1], with the channels last in memory, the faster layout for convolutions."""
    return to_unit(images.contiguous(memory_format=torch.channels_last), dtype)


def _spread(name: str, images: Tensor) -> dict[str, Tensor]:
    """What training/health.py compares between fakes and real pictures [m, 3, H, W] in [-1, 1]: the standard deviation
    over the rows, averaged over the pixels, and the mean magnitude of a pixel, which is 1 if all are saturated."""
    images = images.detach().float()
    return {f"{name}/std": images.std(dim=0, correction=0).mean(), f"{name}/magnitude": images.abs().mean()}


def _named_and_weighted(alignment: dict[str, Tensor], weights: LossConfig) -> tuple[dict[str, Tensor], Tensor]:
    """The terms by metric name, and the weighted sum of the terms. A term and its weight have the same name."""
    named = {f"loss/{name}": value for name, value in alignment.items()}
    return named, sum(getattr(weights, name) * value for name, value in alignment.items())
