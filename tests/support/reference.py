"""The method in plain PyTorch: one process, the whole batch at once, no engines, no micro-batches, no cut graphs.

The two ZeRO engines must reproduce its results. It follows the table in `dist_t2i.training.gan`, and shares only the
networks, the losses of single terms and the random numbers with that module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dist_t2i.data.stream.batch import Batch
from dist_t2i.losses import functional as losses
from dist_t2i.models.augmentation import augment
from dist_t2i.models.text_encoder import TextEmbedding
from dist_t2i.training.noise import RowNoise, perturbation, region_negatives, row_noise, second_noise
from models_on_disk import networks_of


class Seen(NamedTuple):
    """The inputs of both steps: a batch, the images seen before it, and its random numbers. `real`: augmented, float
    [B, 3, H, W]. `same`: bool [B, B], true for pairs that are not negatives."""

    batch: Batch
    images: int
    noise: RowNoise
    real: torch.Tensor
    same: torch.Tensor


class Embedded(NamedTuple):
    """Values of D's step, detached: sentences and embeddings of the captions, embeddings of the real pictures and their
    regions, and, if words are aligned, the words of the captions with their mask."""

    sentence: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor
    regions: torch.Tensor | None
    words: torch.Tensor | None
    mask: torch.Tensor


class WithMuon:
    """AdamW for all parameters, except that the matrices of `generator` get Muon's step, by a double-precision SVD."""

    def __init__(self, adamw, generator, options):
        self.adamw, self.options = adamw, options
        self.momentum = {p: torch.zeros_like(p) for p in generator.parameters() if p.ndim > 1}

    def step(self):
        o = self.options
        for p, momentum in self.momentum.items():
            gradient, p.grad = p.grad, None  # AdamW skips parameters without a gradient
            momentum.mul_(o.muon_momentum).add_(gradient, alpha=1 - o.muon_momentum)
            ahead = (1 - o.muon_momentum) * gradient + o.muon_momentum * momentum
            u, values, v = torch.linalg.svd(ahead.double().flatten(1), full_matrices=False)
            values = values / values.square().sum().sqrt()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            step = (u * values) @ v * 0.2 * max(u.shape[0], v.shape[1]) ** 0.5
            with torch.no_grad():
                p.mul_(1 - o.generator_lr * o.weight_decay).sub_(o.generator_lr * step.view_as(p))
        self.adamw.step()


class Reference:
    """Single-process training with `torch.optim.AdamW` (and Muon if configured), with one optimizer per engine."""

    def __init__(self, config, vocab_size, frozen=None):
        torch.manual_seed(config.train.seed)
        self.config, self.frozen = config, frozen
        self.nets = networks_of(config, vocab_size, frozen)
        o = config.optimizer

        def adam(module, lr):
            hyper = {"betas": (o.beta1, o.beta2), "eps": o.epsilon, "weight_decay": o.weight_decay}
            return torch.optim.AdamW(module.parameters(), lr, **hyper, foreach=False)

        self.optimizers = {
            "g": adam(self.nets.generator, o.generator_lr),
            "d": adam(self.nets.discriminator, o.discriminator_lr),
        }
        if o.generator_matrices == "muon":
            self.optimizers["g"] = WithMuon(self.optimizers["g"], self.nets.generator.generator, o)
        if self.nets.text is not None:
            self.optimizers["t"] = adam(self.nets.text, o.discriminator_lr)

    def state(self):
        modules = [m for m in (self.nets.generator, self.nets.discriminator, self.nets.text) if m is not None]
        return {name: p.detach().clone() for module in modules for name, p in module.named_parameters()}

    def _encode(self, own, batch) -> TextEmbedding:
        for encoder in (own, self.nets.text, self.frozen):
            if encoder is not None:
                return encoder(batch.tokens, batch.lengths)
        raise AssertionError("no encoder")

    def step(self, batch, images):
        """D's step, then G's step, on a whole batch at `images` seen. Returns metric name -> loss."""
        c = self.config
        noise = row_noise(c.train.seed, batch.positions, c.model.generator)
        real = augment(self._pixels(batch.images), noise.augmentation, c.augment)
        seen = Seen(batch, images, noise, real, losses.same_pairs(batch.image_ids, batch.caption_ids))

        self._zero()
        total, embedded, d_losses = self._d_losses(seen)
        total.backward()
        text_gradients = [self._text_gradient()]
        self._step("d", self.nets.discriminator)

        self._zero()
        total, g_losses = self._g_losses(seen, embedded)
        total.backward()
        text_gradients.append(self._text_gradient())
        self._step("g", self.nets.generator)
        if "t" in self.optimizers:
            for p, of_d, of_g in zip(self.nets.text.parameters(), *text_gradients, strict=True):
                p.grad = of_d + of_g
            self._step("t", self.nets.text)
        return d_losses | g_losses

    def _step(self, name, module):
        if largest := self.config.optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(module.parameters(), largest)
        self.optimizers[name].step()

    def _d_losses(self, seen):
        """The total, the values of real pictures that G's step needs, and the single losses."""
        w, d = self.config.loss, self.nets.discriminator.discriminator
        sent_d, word_d, mask = self._encode(self.nets.discriminator.text_d, seen.batch)
        with torch.no_grad():
            fake = self._fake(seen)[0]
        x = seen.real.clone().requires_grad_(True)
        fx, ff = d.features(x), d.features(fake)
        pictures, captions = d.embed_pictures(fx), d.embed_captions(TextEmbedding(sent_d, word_d, mask))
        d_loss = self._hinge(fx, ff, sent_d, seen.same, pictures["image"] @ captions["text"].T)
        align_x, align_t = pictures["image"], captions["text"]
        d_alignment = losses.info_nce(align_x, align_t, w.temperature, seen.same)
        total = d_loss + w.d_alignment * d_alignment
        regions_x = pictures["regions"] if d.region_sizes else None
        if regions_x is not None:
            total = total + w.d_alignment_regions * losses.region_info_nce(
                regions_x, captions["region_text"], w.region_temperature, seen.same
            )
        words = captions["words"] if d.word_size else None
        if words is not None:
            total = total + w.d_alignment_words * self._words(pictures["word_regions"], words, mask, seen)
        if seen.images // self.config.train.global_batch % w.penalty_every == 0 and w.penalty != "none":
            total = total + w.penalty_weight * w.penalty_every * self._penalty(seen, x, fx, sent_d)
        parts = sent_d, align_t, align_x, regions_x, words, mask
        embedded = Embedded(*(None if one is None else one.detach() for one in parts))
        return total, embedded, {"loss/d_adversarial": d_loss.item(), "loss/d_alignment": d_alignment.item()}

    def _hinge(self, fx, ff, sent_d, same, cosines):
        """On real pictures, fakes, and real pictures with the most similar wrong caption of their group."""
        mismatched, adversarial = self.config.loss.mismatched, self.nets.discriminator.discriminator.adversarial
        group, partner = self.config.loss.mismatched_group, []
        for row in range(len(same)):
            first = row // group * group
            others = [other for other in range(first, first + group) if other != row]
            partner.append(max(others, key=lambda o: (not same[row, o], cosines[row, o].item())))
        partner = torch.tensor(partner)
        wrong = adversarial(fx, sent_d[partner])
        right_by_chance = same[torch.arange(len(same)), partner].view(-1, *[1] * (wrong.dim() - 1))
        real = adversarial(fx, sent_d)
        loss = (1 - real).relu().mean() + (1 - mismatched) * (1 + adversarial(ff, sent_d)).relu().mean()
        return loss + mismatched * ((1 + wrong).relu() * ~right_by_chance).mean()

    def _penalty(self, seen, x, fx, sent_d):
        w, d = self.config.loss, self.nets.discriminator.discriminator
        s = sent_d.detach().requires_grad_(True)
        logits = d.adversarial(fx, s)
        if w.penalty == "r1":
            return losses.r1(logits, x)
        if w.penalty == "ma_gp":
            return losses.ma_gp(logits, x, s)
        pixels = perturbation(self.config.train.seed, seen.batch.positions, x.shape[-1])
        moved = d.adversarial(d.features(x + w.penalty_sigma * pixels), s)
        return losses.fd_r1(logits, moved, w.penalty_sigma)

    def _g_losses(self, seen, real):
        """The total and the single losses, by the updated D; S_D and the embeddings of real pictures are those of D's
        step."""
        w, d = self.config.loss, self.nets.discriminator.discriminator
        fake, out = self._fake(seen)
        ff = d.features(fake)
        g_loss = -d.adversarial(ff, real.sentence).mean()
        pictures = d.embed_pictures(ff)
        align_f = pictures["image"]
        to_text = losses.info_nce(align_f, real.text, w.temperature, seen.same)
        to_image = losses.info_nce(align_f, real.image, w.temperature, seen.same)
        kl = losses.kl_condition(out.mean, out.log_variance)
        total = g_loss + w.g_alignment_text * to_text + w.g_alignment_image * to_image + w.kl * kl
        if real.regions is not None:
            c = self.config
            places = region_negatives(c.train.seed, seen.images, c.model.discriminator.regions, c.loss.region_negatives)
            total = total + w.g_alignment_regions * losses.region_info_nce(
                pictures["regions"], real.regions, w.region_temperature, seen.same, places
            )
        if w.pixels:
            total = total + w.pixels * (out.images - self._pixels(seen.batch.images)).abs().mean()
        if w.g_mode_seeking:
            total = total + w.g_mode_seeking * self._mode_seeking(seen, ff.pooled)
        if self.config.edit.width:
            total = total + self._pixel_errors(seen, out)
        if real.words is not None:
            total = total + w.g_alignment_words * self._words(pictures["word_regions"], real.words, real.mask, seen)
        return total, {
            "loss/g_adversarial": g_loss.item(),
            "loss/g_alignment_text": to_text.item(),
            "loss/g_alignment_image": to_image.item(),
            "loss/kl": kl.item(),
        }

    def _mode_seeking(self, seen, pooled):
        """Of every other row of each rank's micro-batch: all rows with another noise, of which every other is used."""
        noise = second_noise(self.config.train.seed, seen.batch.positions, self.config.model.generator)
        other = self.nets.discriminator.discriminator.features(self._fake(seen, noise)[0]).pooled
        cosine = (F.normalize(pooled, dim=1) * F.normalize(other, dim=1)).sum(1)
        return -(1 - cosine).clamp_min(losses.LEAST_DISTANCE).log()[::2].mean()

    def _words(self, regions, words, mask, seen):
        w = self.config.loss
        return losses.word_info_nce(regions, words, mask, w.word_temperature, seen.same, w.word_sharpness)

    def _fake(self, seen, other_noise=None):
        """The augmented fakes, and all outputs of G."""
        text = self._encode(self.nets.generator.text_g, seen.batch)
        noise, condition_noise = other_noise or (seen.noise.noise, seen.noise.condition_noise)
        guide = []
        if self.config.edit.width:
            sources, given = self._pixels(seen.batch.sources), seen.batch.source_ids >= 0
            guide = [self.nets.generator.source(sources, text, given)]
        out = self.nets.generator.generator(noise, text.sentence, text.words, text.mask, condition_noise, *guide)
        return augment(out.images, seen.noise.augmentation, self.config.augment), out

    @staticmethod
    def _pixels(images):
        return images.float() / 127.5 - 1

    def _pixel_errors(self, seen, out):
        """Weighted errors of edits: edits whose source is the real picture itself, and edits of another source."""
        w, batch = self.config.loss, seen.batch
        difference = (out.images - self._pixels(batch.images)).flatten(1)
        errors, squares = difference.abs().mean(1), difference.square().mean(1)
        way = (self._pixels(batch.sources) - self._pixels(batch.images)).square().flatten(1).mean(1)
        left = squares / way.clamp_min(losses.LEAST_WAY)
        own = torch.tensor([int(a) == int(b) for a, b in zip(batch.source_ids, batch.image_ids, strict=True)])
        other = ~own & (batch.source_ids != -1)
        return w.reconstruction * (errors * own).mean() + w.edit_target * (left * other).mean()

    def _text_gradient(self):
        """Of the shared encoder, which both losses train; none when there is no such encoder."""
        parameters = self.nets.text.parameters() if self.nets.text else []
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    def _zero(self):
        modules: list[nn.Module] = [self.nets.generator, self.nets.discriminator]
        for module in modules + ([self.nets.text] if self.nets.text else []):
            module.zero_grad(set_to_none=True)
