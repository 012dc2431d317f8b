"""One contract for all methods, whichever there are."""

import pytest
import torch
import torch.multiprocessing as mp
from every_method import SIZE, build, methods

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.training.chunked import buffers_kept
from ssl_kit.training.distributed import leave
from ssl_kit.training.optim import Optim

BATCH = 8
SLICES = {2: (slice(0, 5), slice(5, 8)), 3: (slice(0, 1), slice(1, 5), slice(5, 8))}  # of so many processes
LABELS = (torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH))


@pytest.fixture(params=methods(), ids=lambda kind: kind.__name__)
def method(request):
    torch.manual_seed(0)
    return build(request.param)


def batch(method, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(BATCH, 3, *SIZE, generator=generator)
    views = [
        (images + 0.1 * torch.rand(images.shape, generator=generator)).clamp(0, 1) for _ in range(method.num_views)
    ]
    return [view.to(dtype) for view in views], Key(0, 0, torch.arange(BATCH))


def test_methods_were_methods():
    assert "SimCLR" in [kind.__name__ for kind in methods()]


def test_loss_is_a_finite_scalar_and_every_parameter_gets_a_gradient(method):
    loss = method.loss(*batch(method))["loss"]
    assert loss.ndim == 0 and torch.isfinite(loss)
    loss.backward()
    trained = [(name, parameter) for name, parameter in method.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in trained if parameter.grad is None]
    assert not missing


def test_ten_steps_lower_the_loss_on_one_batch(method):
    optimiser = torch.optim.SGD(method.parameters(), lr=0.05)
    views, key = batch(method)
    losses = []
    for _ in range(11):
        with buffers_kept(method):  # a center that moves is another loss
            loss = method.loss(views, key)["loss"]
            optimiser.zero_grad()
            loss.backward()
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < losses[0]


def test_labels_are_never_read(method):
    views, key = batch(method)
    method.eval()  # batch statistics aside, equal inputs give equal losses
    losses = [method.training_step({"views": views, "key": key, "label": labels}, 0)["loss"] for labels in LABELS]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(method.training_step({"views": views, "key": key}, 0)["loss"], losses[0])


def step(kind, part):
    """Loss and gradient of a training step on a part of the batch; in eval mode, so without batch statistics."""
    torch.manual_seed(0)
    method = build(kind).eval()
    views, key = batch(method)
    own = {"views": [view[part] for view in views], "key": Key(0, 0, key.index[part])}
    loss = method.training_step(own, 0)["loss"]
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in method.parameters() if parameter.grad is not None]
    return loss.detach()[None], torch.cat(gradients)


def one_rank(rank, world, port, queue):
    torch.set_num_threads(1)
    wanted = {kind: step(kind, slice(None)) for kind in methods()}
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    errors = {}
    for kind, alone in wanted.items():
        for name, value, one in zip(("loss", "gradient"), step(kind, SLICES[world][rank]), alone, strict=True):
            torch.distributed.all_reduce(value)  # what data-parallel training does
            errors[f"{kind.__name__} {name}"] = ((value / world - one).abs().max() / one.abs().max()).item()
    if rank == 0:
        queue.put(errors)
    torch.distributed.barrier()
    leave()


@pytest.mark.parametrize("world", SLICES)
def test_processes_with_unequal_slices_equal_one_on_the_joined_batch(world, free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(one_rank, args=(world, free_port, queue), nprocs=world)
    errors = queue.get()
    assert len(errors) == 2 * len(list(methods())) and max(errors.values()) <= 1e-5, errors


def test_a_wrong_number_of_views_is_a_clear_error(method):
    views, key = batch(method)
    with pytest.raises(ValueError, match=rf"{type(method).__name__} takes {method.num_views} views .* got"):
        method.training_step({"views": [*views, views[0]], "key": key}, 0)


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precision_is_close_and_stays_finite(method, dtype, off):
    """float16 with its gradients scaled, as the trainer scales them."""
    with buffers_kept(method), torch.no_grad():
        wanted = method.loss(*batch(method))["loss"]
    with torch.autocast("cpu", dtype):
        loss = method.loss(*batch(method))["loss"]
    assert loss.dtype == torch.float32 and (loss - wanted).abs() <= off * wanted.abs()
    (1024 * loss).backward()
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_encoder_survives_export(method, tmp_path):
    method.eval()
    images = batch(method)[0][0]
    method.encoder.save(tmp_path / "encoder")
    assert torch.equal(Encoder.load(tmp_path / "encoder")(images), method.embed(images))


def test_chance_is_where_a_collapsed_model_sits(method):
    chance = method.chance_loss(BATCH)
    if chance is None:
        pytest.skip("this method states no chance level")
    views, key = batch(method)
    with torch.no_grad():
        method.prepare(lambda encoder, most: encoder.eval()(views[0]))
        for name, parameter in method.named_parameters():
            if name.partition(".")[0] not in method.external:  # what a teacher of others sees is no part of the model
                parameter.zero_()
    assert method.loss(views, key)["loss"].item() == pytest.approx(chance, rel=1e-3)


def test_pictures_are_images(method):
    method.eval()
    with torch.no_grad():
        pictures = method.pictures(*batch(method))
    for name, picture in pictures.items():
        assert name.isidentifier() and picture.caption
        assert picture.grid.ndim == 5 and picture.grid.shape[2] == 3, name
        assert picture.columns == () or len(picture.columns) == picture.grid.shape[1], name
        assert picture.grid.min() >= 0 and picture.grid.max() <= 1 and torch.isfinite(picture.grid).all(), name
        assert torch.equal(picture.grid, method.pictures(*batch(method))[name].grid), "pictures repeat"


class Taught(Method):
    """A method with a frozen teacher of others, and one that reads labels."""

    num_views, external, uses_labels = 1, ("teacher",), True

    def __init__(self, encoder, optim=Optim()):
        super().__init__(encoder, optim)
        self.teacher = torch.nn.Linear(4, 4).requires_grad_(False)

    def loss(self, views, key, labels):
        known = labels >= 0
        return {"loss": (self.encoder(views[0]).mean(dim=1) - labels).square()[known].mean()}


def test_external_modules_are_in_no_checkpoint_and_must_be_the_same():
    taught = Taught(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE))
    state, checkpoint = taught.state_dict(), {}
    assert state and not any(name.startswith("teacher") for name in state)
    taught.on_save_checkpoint(checkpoint)
    before = taught.teacher.weight.clone()
    taught.load_state_dict(state)
    assert torch.equal(taught.teacher.weight, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        taught.load_state_dict({name: value for name, value in state.items() if "conv1" not in name})
    taught.on_load_checkpoint(checkpoint)
    taught.teacher.weight[0, 0] += 1
    with pytest.raises(UserError, match="--resume: teacher has other weights"):
        taught.on_load_checkpoint(checkpoint)


def test_a_method_that_uses_labels_is_given_them():
    taught = Taught(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE)).eval()
    views, key = batch(taught)
    labels = torch.tensor([3, -1, 1, -1, 0, 2, -1, 1])
    told = taught.training_step({"views": views, "key": key, "label": labels}, 0)["loss"]
    assert told == taught.loss(views, key, labels)["loss"]
    assert told != taught.training_step({"views": views, "key": key, "label": labels.clamp(min=0)}, 0)["loss"]
