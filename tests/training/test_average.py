"""The moving average of the encoder against its closed form; its schedule; buffers; a restart."""

import pytest
import torch
from tiny_runs import Tiny, train

from ssl_kit.core.errors import UserError
from ssl_kit.training.guard import Watchdog
from ssl_kit.training.optim import Average, Optim, cosine_decay

SGD = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0)


class Encoders(Average):
    """Keeps the trained weights and buffers of every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trained = []

    def on_train_start(self, trainer, pl_module):
        self.first = {name: value.clone() for name, value in pl_module.encoder.state_dict().items()}
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *rest):
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.trained.append({name: value.clone() for name, value in pl_module.encoder.state_dict().items()})


def run(module, average, **options):
    train(module, [average.watchdog, average], **options)
    return average.encoder(module).state_dict()


def test_cosine_reaches_its_five_points():
    wanted = [0.996, 0.9965858, 0.998, 0.9994142, 1.0]
    assert [cosine_decay(0.996, done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(wanted, abs=1e-7)


def test_it_is_the_weighted_mean_of_all_steps_and_copies_running_statistics():
    average = Encoders(0.8, Watchdog(), lambda: 8)
    averaged = run(Tiny(SGD), average)
    wanted = average.first["0.weight"].double()
    for trained in average.trained:
        wanted = 0.8 * wanted + 0.2 * trained["0.weight"].double()
    torch.testing.assert_close(averaged["0.weight"].double(), wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(averaged["0.weight"], average.trained[-1]["0.weight"], atol=1e-4)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(averaged[name], average.trained[-1][name])


def test_constant_weights_stay_and_one_jump_decays():
    module, average = Tiny(SGD), Average(0.9, Watchdog(), lambda: 8)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.head.bias.requires_grad_(True)
    with torch.no_grad():
        average.encoder(module)[0].weight.add_(1)  # theta_0 = w + 1
    averaged = run(module, average)
    torch.testing.assert_close(averaged["0.weight"] - module.encoder[0].weight, torch.full((4, 3, 3, 3), 0.9**8))
    assert torch.equal(averaged["0.bias"], module.encoder[0].bias)


def test_the_cosine_ends_where_nothing_moves():
    average = Encoders(0.5, Watchdog(), lambda: 8, cosine=True)
    averaged = run(Tiny(SGD), average)
    wanted = average.first["0.weight"].double()
    for step, trained in enumerate(average.trained):
        decay = cosine_decay(0.5, step / 7)
        wanted = decay * wanted + (1 - decay) * trained["0.weight"].double()
    torch.testing.assert_close(averaged["0.weight"].double(), wanted, atol=1e-6, rtol=0)


def test_it_moves_once_per_accumulated_step():
    optim = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0, accumulate=4)
    average = Encoders(0.5, Watchdog(), lambda: 2)
    averaged = run(Tiny(optim), average, accumulate=4)
    wanted = 0.25 * average.first["0.weight"] + 0.25 * average.trained[3]["0.weight"]
    torch.testing.assert_close(averaged["0.weight"], wanted + 0.5 * average.trained[7]["0.weight"])


def test_it_survives_a_restart():
    module, average = Tiny(SGD), Average(0.9, Watchdog(), lambda: 8)
    averaged = run(module, average)
    resumed = Average(0.9, Watchdog(), lambda: 8)
    resumed.load_state_dict(average.state_dict())
    assert resumed.state_dict()["encoder"].keys() == averaged.keys()  # also before it is used
    for name, value in resumed.encoder(Tiny(SGD)).state_dict().items():
        assert torch.equal(value, averaged[name]), name
    assert not resumed.encoder(module).training


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UserError, match="between 0 and 1"):
        Average(decay, Watchdog(), lambda: 8)
