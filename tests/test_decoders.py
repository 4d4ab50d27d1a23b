"""One decoder on each frozen block: the encoder stays frozen, decoders do not mix, they learn."""

import pytest
import torch
import torch.nn.functional as F

from refiner.base.tensors import step_generator
from refiner.images.toybox import render
from refiner.models import mae as M
from refiner.models.encoders import last_tokens, plain_vit, preprocess
from refiner.models.load import build_vit, load_model
from refiner.training.decoders import decode_blocks

SMALL = {"batch": 8, "steps": 6, "decoder_dim": 8, "log_every": 2, "progress": False}


@pytest.fixture(scope="module")
def pixels():
    return render(96).images


@pytest.fixture
def model():
    return build_vit(size=32, patch=4, dim=16, depth=3, heads=2, seed=0)


def test_the_encoder_gets_no_gradient_and_stays_as_it_was(model, pixels):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = decode_blocks(model, pixels, pixels[:8], **SMALL)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is not None for p in found.decoders.parameters())


@pytest.mark.parametrize("block", [1, -1])
def test_training_all_together_equals_training_one_alone(model, pixels, block):
    together = decode_blocks(model, pixels, pixels[:8], **SMALL)
    alone = decode_blocks(model, pixels, pixels[:8], blocks=[block], **SMALL)
    at = together.blocks.index(alone.blocks[0])
    assert torch.equal(alone.error, together.error[at : at + 1]) and alone.guess == together.guess
    mine, theirs = alone.decoders[0].state_dict(), together.decoders[at].state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert [e["step"] for e in alone.history] == [2, 4, 6]
    assert [e["loss"][at] for e in together.history] == [e["loss"][0] for e in alone.history]


def test_the_decoder_is_that_of_mae_for_the_same_weights(model, pixels):
    mae = M.MaskedAutoencoder(model, decoder_dim=8, decoder_heads=2).eval()
    decoder = decode_blocks(model, pixels, pixels[:8], **SMALL).decoders[0]
    names = {
        "embed": "decoder_embed",
        "mask_token": "mask_token",
        "blocks": "decoder_blocks",
        "norm": "decoder_norm",
        "predict": "decoder_pred",
    }
    renamed = {
        ".".join([names[key.split(".")[0]], *key.split(".")[1:]]): value
        for key, value in decoder.state_dict().items()
        if key != "positions"
    }
    missing, unexpected = mae.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(k.startswith("encoder.") or k == "decoder_pos_embed" for k in missing)
    visible, _ = M.random_masking(4, 64, 0.75, torch.Generator().manual_seed(0))
    tokens = torch.randn(4, 17, 16)
    with torch.no_grad():
        wanted = mae.decode(F.layer_norm(tokens, (16,)), visible)
        assert torch.allclose(decoder(tokens, visible), wanted, atol=1e-6)


def test_errors_are_those_of_the_paintings(model, pixels):
    """Of the last block and of the mean patch, written out from its last tokens."""
    found = decode_blocks(model, pixels, pixels[:8], **SMALL)
    x = preprocess(pixels[:8], model.refiner_card)
    visible, mask = M.random_masking(8, 64, 0.75, step_generator(0, 2**32 - 1))
    with torch.no_grad():
        tokens = last_tokens(model.eval(), x, kept_BK=visible)
        painted = found.decoders[-1](tokens, visible)
    error = (painted - M.patchify(x, 4)).square().mean(2)[mask].mean()
    assert found.error[-1] == pytest.approx(error.item(), rel=1e-5)
    mean = M.patchify(preprocess(pixels, model.refiner_card), 4).mean((0, 1))
    guess = (M.patchify(x, 4) - mean).square().mean(2)[mask].mean()
    assert found.guess == pytest.approx(guess.item(), rel=1e-5)
    assert torch.allclose(found.relative_error, found.error / guess, rtol=1e-5)


def test_what_a_block_throws_away_cannot_be_painted(model):
    """Images of one colour each; block 2 makes all tokens alike."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (128, 3, 1, 1), generator=generator, dtype=torch.uint8)
    images = colours.expand(-1, -1, 32, 32)

    class Wipe(torch.nn.Module):
        def forward(self, x):
            return torch.linspace(-1, 1, 16).expand_as(x)

    model.blocks[1] = Wipe()
    options = SMALL | {"steps": 80, "decoder_dim": 16, "lr": 2e-2}
    first, *rest = decode_blocks(model, images[:96], images[96:], **options).relative_error
    assert first < 0.4 and min(rest) > 0.9


def test_a_pretrained_last_block_beats_a_constant_guess(pixels):
    found = decode_blocks(
        load_model("mae_toybox"),
        pixels[:64],
        pixels[64:],
        blocks=[-1],
        steps=60,
        batch=16,
        progress=False,
    )
    assert found.blocks == (12,) and found.relative_error[0] < 0.9
    assert found.history[-1]["loss"][0] < found.history[0]["loss"][0]


def test_a_model_without_a_class_token(pixels):
    model = plain_vit(size=32, patch=4, dim=16, depth=2, heads=2, class_token=False)
    assert decode_blocks(model, pixels, pixels[:8], **SMALL).error.shape == (2,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 200}, "96 train and 8 test images are too few"),
        ({"decoder_dim": 6}, "multiple of 4"),
        ({"blocks": [4]}, "choose among 1 to 3"),
    ],
)
def test_what_cannot_be_is_refused(model, pixels, options, message):
    with pytest.raises(ValueError, match=message):
        decode_blocks(model, pixels, pixels[:8], **(SMALL | options))


def test_a_loss_that_explodes_stops_the_run(model, pixels):
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        decode_blocks(model, pixels, pixels[:8], **(SMALL | {"lr": 1e30, "log_every": 1}))
