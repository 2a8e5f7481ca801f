"""The method in plain PyTorch: one process, the whole batch at once, no engines, no micro-batches, no cut graphs.

What the two ZeRO engines must reproduce. Written from the table in `dist_t2i.gan`, sharing only the networks, the losses
on single terms and the random numbers with it.
"""

from __future__ import annotations

import torch
from torch import nn

from dist_t2i import losses
from dist_t2i.draws import draw, draw_pixels, draw_places
from dist_t2i.models.augment import augment
from dist_t2i.models.text import TextEmbedding
from dist_t2i.networks import build_networks


class Reference:
    """Single-process training with `torch.optim.AdamW`, one optimizer for each engine of the real thing."""

    def __init__(self, config, vocab_size, frozen=None):
        torch.manual_seed(config.train.seed)
        self.config, self.frozen = config, frozen
        self.nets = build_networks(config, vocab_size, frozen)
        o = config.optimizer

        def adam(module, lr):
            hyper = {"betas": (o.beta1, o.beta2), "eps": o.epsilon, "weight_decay": o.weight_decay}
            return torch.optim.AdamW(module.parameters(), lr, **hyper, foreach=False)

        self.optimizers = {
            "g": adam(self.nets.generator, o.generator_lr),
            "d": adam(self.nets.discriminator, o.discriminator_lr),
        }
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
        c, w = self.config, self.config.loss
        g, d = self.nets.generator.generator, self.nets.discriminator.discriminator
        draws = draw(c, batch.positions)
        real = augment(batch.images.float() / 127.5 - 1, draws.augmentation, c.augment)
        same = losses.same_pairs(batch.image_ids, batch.caption_ids)
        text_gradient = [torch.zeros_like(p) for p in self.nets.text.parameters()] if self.nets.text else []

        def keep_text_gradient():
            for kept, p in zip(text_gradient, self.nets.text.parameters() if self.nets.text else [], strict=True):
                kept += p.grad if p.grad is not None else 0

        def generate():
            text = self._encode(self.nets.generator.text_g, batch)
            return g(draws.noise, text.sentence, text.words, text.mask, draws.condition_noise)

        # D's step
        self._zero()
        sent_d = self._encode(self.nets.discriminator.text_d, batch).sentence
        with torch.no_grad():
            fake = augment(generate().images, draws.augmentation, c.augment)
        x = real.clone().requires_grad_(True)
        fx, ff = d.features(x), d.features(fake)
        partner = torch.arange(len(x)) ^ 1
        wrong = d.adversarial(fx, sent_d[partner])
        right_by_chance = same[torch.arange(len(x)), partner].view(-1, *[1] * (wrong.dim() - 1))
        real_logits = d.adversarial(fx, sent_d)
        d_loss = (1 - real_logits).relu().mean() + (1 - w.mismatched) * (1 + d.adversarial(ff, sent_d)).relu().mean()
        d_loss = d_loss + w.mismatched * ((1 + wrong).relu() * ~right_by_chance).mean()
        align_x, align_t = d.align_image(fx), d.align_text(sent_d)
        d_alignment = losses.info_nce(align_x, align_t, w.temperature, same)
        total = d_loss + w.d_alignment * d_alignment
        regions_x = d.align_regions(fx) if d.region_sizes else None
        if regions_x is not None:
            total = total + w.d_alignment_regions * losses.region_info_nce(
                regions_x, d.align_region_text(sent_d), w.region_temperature, same
            )
        if images // c.train.global_batch % w.penalty_every == 0 and w.penalty != "none":
            s = sent_d.detach().requires_grad_(True)
            logits = d.adversarial(fx, s)
            if w.penalty == "r1":
                penalty = losses.r1(logits, x)
            elif w.penalty == "ma_gp":
                penalty = losses.ma_gp(logits, x, s)
            else:
                pixels = draw_pixels(c, batch.positions, x.shape[-1])
                moved = d.adversarial(d.features(x + w.penalty_sigma * pixels), s)
                penalty = losses.fd_r1(logits, moved, w.penalty_sigma)
            total = total + w.penalty_weight * w.penalty_every * penalty
        total.backward()
        keep_text_gradient()
        self.optimizers["d"].step()

        # G's step: D as updated, S_D and the embeddings of real pictures as the D step saw them
        self._zero()
        out = generate()
        ff = d.features(augment(out.images, draws.augmentation, c.augment))
        g_loss = -d.adversarial(ff, sent_d.detach()).mean()
        align_f = d.align_image(ff)
        to_text = losses.info_nce(align_f, align_t.detach(), w.temperature, same)
        to_image = losses.info_nce(align_f, align_x.detach(), w.temperature, same)
        kl = losses.kl_condition(out.mean, out.log_variance)
        total = g_loss + w.g_alignment_text * to_text + w.g_alignment_image * to_image + w.kl * kl
        if regions_x is not None:
            total = total + w.g_alignment_regions * losses.region_info_nce(
                d.align_regions(ff), regions_x.detach(), w.region_temperature, same, draw_places(c, images)
            )
        total.backward()
        keep_text_gradient()
        self.optimizers["g"].step()
        if "t" in self.optimizers:
            for p, gradient in zip(self.nets.text.parameters(), text_gradient, strict=True):
                p.grad = gradient
            self.optimizers["t"].step()
        return {
            "loss/d_adversarial": d_loss.item(),
            "loss/d_alignment": d_alignment.item(),
            "loss/g_adversarial": g_loss.item(),
            "loss/g_alignment_text": to_text.item(),
            "loss/g_alignment_image": to_image.item(),
            "loss/kl": kl.item(),
        }

    def _zero(self):
        modules: list[nn.Module] = [self.nets.generator, self.nets.discriminator]
        for module in modules + ([self.nets.text] if self.nets.text else []):
            module.zero_grad(set_to_none=True)
