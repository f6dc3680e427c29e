import pytest
import torch

from ormo_worker import RemoteOptimizer
from system.programs import Stage

timm = pytest.importorskip("timm", reason="`make test-integrations` installs it")


def test_a_model_of_timms_trains_with_its_batch_norm(stage: Stage) -> None:
    stage.server(learning_rate=0.05, stop_after_gradients=3)
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    with RemoteOptimizer(model, stage.address, batch_size=8) as optimizer:
        while not optimizer.finished:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step(loss=loss)
            losses.append(loss.item())
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert int(model.bn1.num_batches_tracked) == 3
