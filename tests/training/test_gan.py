"""The table of gradient flows (dist_t2i/training/gan.py), parameter by parameter, in every text mode, without and with
words.

With words: the generator attends to the words of S_G, and D's alignment branch aligns the words of S_D.
"""

from __future__ import annotations

import pytest

from ranks import run_ranks

pytestmark = pytest.mark.slow

D_SIDE, G_SIDE = {"discriminator", "text_d"}, {"generator", "text_g"}
TABLE = {
    "loss/d_adversarial": D_SIDE,
    "loss/d_alignment": D_SIDE,
    "loss/d_alignment_regions": D_SIDE,
    "loss/d_alignment_words": D_SIDE,
    "loss/d_penalty": {"discriminator"},
    "loss/g_adversarial": G_SIDE,
    "loss/g_alignment_text": G_SIDE,
    "loss/g_alignment_image": G_SIDE,
    "loss/g_alignment_regions": G_SIDE,
    "loss/g_alignment_words": G_SIDE,
    "loss/g_pixels": G_SIDE,
    "loss/g_mode_seeking": G_SIDE,
    "loss/kl": G_SIDE,
}
"""Which modules a loss changes (text.mode=dual); it must change every one of them, and nothing else."""

# The share of wrong captions is uneven: if half were wrong, the gradient of the last bias could cancel to zero.
OVERRIDES = {
    "loss__penalty_every": 1,
    "model__discriminator__patches": 8,
    "loss__mismatched": 0.37,
    "loss__pixels": 2.0,
    "loss__g_mode_seeking": 0.3,
}
WORDS = {"model__generator__kind": "attn", "model__discriminator__words": 8}
CASES = [(mode, words) for mode in ("dual", "shared", "frozen") for words in ("", "words")]
"""(text.mode, whether words are read and aligned)"""


def expected_table(words: str) -> dict[str, set[str]]:
    return {loss: allowed for loss, allowed in TABLE.items() if words or not loss.endswith("_words")}


def flows_of_cases() -> dict:
    """`flows` of every case, all in one process, because starting a process takes longer than a case."""
    return {case: flows(*case) for case in CASES}


def flows(mode: str, words: str, penalty: str = "r1", **more) -> dict:
    """The effects of one step: the parameters with a gradient of each loss, and those that each half changed."""
    import torch

    from dist_t2i.training.gan import Gan
    from small_gan import build_gan, frozen_encoder, micro_batches, tiny_config

    config = tiny_config(**OVERRIDES, **(WORDS if words else {}), loss__penalty=penalty, text__mode=mode, **more)
    built = build_gan(config, frozen_encoder() if mode == "frozen" else None)
    found: dict = {"gradients": {}, "changed": {}, "all": set()}

    def parameters():
        return {n: p for engine in built.engines for n, p in engine.module.named_parameters()}

    class Probe(Gan):
        def _record(self, terms, rows):
            for name, value in terms.items():
                trained = {n: p for n, p in parameters().items() if p.requires_grad}
                if value.requires_grad:
                    gradients = torch.autograd.grad(value, trained.values(), retain_graph=True, allow_unused=True)
                    found["gradients"][name] = {
                        n for n, g in zip(trained, gradients, strict=True) if g is not None and g.abs().sum() > 0
                    }
            super()._record(terms, rows)

        def _discriminator_step(self, *arguments):
            return self._watched("d", super()._discriminator_step, *arguments)

        def _generator_step(self, *arguments):
            return self._watched("g", super()._generator_step, *arguments)

        def _watched(self, half, function, *arguments):
            before = {n: p.detach().clone() for n, p in parameters().items()}
            result = function(*arguments)
            found["changed"][half] = {n for n, p in parameters().items() if not torch.equal(p, before[n])}
            return result

    sections = config.loss, config.augment, config.model, config.train, config.edit
    gan = Probe(built.generator, built.discriminator, built.text, built.frozen, *sections)
    frozen = {n: p.clone() for n, p in built.frozen.named_parameters()} if built.frozen else {}
    gan.step(micro_batches(0, 1, 0, 1), 0, 1.0)
    found["all"] = set(parameters())
    found["frozen moved"] = [
        n for n, p in frozen.items() if not torch.equal(dict(built.frozen.named_parameters())[n], p)
    ]
    return found


@pytest.fixture(scope="module")
def found():
    """The flows of every case."""
    return run_ranks(1, flows_of_cases)[0]


def modules(names) -> set[str]:
    return {name.split(".", 1)[0] for name in names}


@pytest.mark.parametrize(("words", "loss"), [(w, loss) for w in ("", "words") for loss in expected_table(w)])
def test_dual_each_loss_reaches_its_modules_and_no_parameter_else(found, words, loss):
    reached = found["dual", words]["gradients"][loss]
    assert modules(reached) == TABLE[loss]
    attention = {name for name in found["dual", words]["all"] if name.startswith("generator.attentions.")}
    assert bool(attention) == bool(words)
    if "generator" in TABLE[loss] and loss != "loss/kl":
        assert attention <= reached


def test_dual_words_are_aligned_by_their_own_projections(found):
    flow = found["dual", "words"]["gradients"]
    own = {name for name in flow["loss/d_alignment_words"] if "projection" in name}
    assert {name.split(".")[1] for name in own} == {"word_projection", "word_region_projection"}
    assert not any(own & reached for loss, reached in flow.items() if loss not in ("loss/d_alignment_words", "loss/d"))


@pytest.mark.parametrize("words", ["", "words"])
def test_dual_kl_reaches_only_the_augmentation_of_the_generator(found, words):
    reached = found["dual", words]["gradients"]["loss/kl"]
    inside = {name for name in reached if name.startswith("generator.")}
    assert inside and all(name.startswith("generator.augmentation.") for name in inside)


@pytest.mark.parametrize(("mode", "words"), CASES)
def test_every_parameter_is_trained_by_the_half_step_that_owns_it_alone(found, mode, words):
    flow = found[mode, words]
    of_d = {n for n in flow["all"] if modules([n]) <= D_SIDE}
    of_g = {n for n in flow["all"] if modules([n]) <= G_SIDE}
    assert flow["changed"]["d"] == of_d
    shared = flow["all"] - of_d - of_g
    assert flow["changed"]["g"] == of_g | shared, "a shared encoder is stepped once, when both sides have spoken"
    assert modules(shared) == ({"text"} if mode == "shared" else set())
    if mode == "dual":
        assert {"text_d", "text_g"} <= modules(flow["all"])


@pytest.mark.parametrize(("mode", "words"), [case for case in CASES if case[0] != "dual"])
def test_losses_of_one_side_never_reach_the_networks_of_the_other(found, mode, words):
    flow = found[mode, words]
    for loss, allowed in expected_table(words).items():
        reached = modules(flow["gradients"][loss])
        assert reached and reached <= {name for name in allowed if not name.startswith("text")}, loss
    assert flow["frozen moved"] == []


def shared_gradients() -> dict:
    """The shared encoder's change in one step, with both gradients, or without the gradient of one side."""

    from dist_t2i.training import text_modes
    from small_gan import build_gan, micro_batches, tiny_config

    config = tiny_config(**OVERRIDES, **WORDS, text__mode="shared")
    propagate, change = text_modes.SharedText.propagate, {}
    for withheld in ("nothing", "generator", "discriminator"):

        def only(self, network, rate_scale, withheld=withheld):
            if network.name == withheld:
                for leaf in self.embedding:
                    if leaf.grad is not None:
                        leaf.grad.zero_()
            propagate(self, network, rate_scale)

        text_modes.SharedText.propagate = only
        gan = build_gan(config)
        before = {n: p.detach().clone() for n, p in gan.text.module.named_parameters()}
        gan.step(micro_batches(0, 1, 0, 1), 0, 1.0)
        change[withheld] = {n: (p - before[n]).detach() for n, p in gan.text.module.named_parameters()}
    return change


def test_both_sides_train_every_parameter_of_a_shared_encoder():
    (change,) = run_ranks(1, shared_gradients)
    for name, both in change["nothing"].items():
        g_alone, d_alone = change["discriminator"][name], change["generator"][name]
        assert g_alone.abs().sum() > 0 and d_alone.abs().sum() > 0, name
        assert not both.equal(g_alone) and not both.equal(d_alone), name


@pytest.mark.parametrize("penalty", ["ma_gp", "fd_r1"])
def test_other_penalties_shape_the_discriminator_alone(penalty):
    (flow,) = run_ranks(1, flows, "dual", "", penalty)
    assert modules(flow["gradients"]["loss/d_penalty"]) == {"discriminator"}


def edit_flows() -> dict:
    return flows("dual", "", edit__width=8, loss__edit_target=1.0)


def test_the_encoder_of_source_pictures_is_the_generators():
    """The losses of D have no gradient for it. The losses of G have one, except the KL of the conditioning."""
    (flow,) = run_ranks(1, edit_flows)
    g_side = G_SIDE | {"source"}
    table = {
        name: g_side if reached == G_SIDE and name != "loss/kl" else reached
        for name, reached in expected_table("").items()
    }
    for loss, reached in (table | {"loss/g_reconstruction": g_side, "loss/g_edit_target": g_side}).items():
        assert modules(flow["gradients"][loss]) == reached, loss
    of_d = {n for n in flow["all"] if modules([n]) <= D_SIDE}
    assert flow["changed"]["d"] == of_d and modules(flow["changed"]["g"]) == g_side
