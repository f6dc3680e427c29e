"""Pull the newest parameters of a run of `rings.py:Rings`, score them, and write them into a file.

It is a reader: it needs a server that has a model, gets no ticket, and may come and go as it likes.
"""

from rings import Rings
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from ormo_worker import ParameterClient, Score, manifest_of

task = Rings()
model = task.build_model().eval()
with ParameterClient("127.0.0.1:50051", manifest_of(model)) as client:
    delivered = client.pull()
    # All parameters one after the other, in the model's order. This model has no buffers.
    nn.utils.vector_to_parameters(delivered.payload.parameters, model.parameters())

score = Score()
for batch in DataLoader(task.test_set(), batch_size=100):
    score += task.score(model, batch)
print(f"iteration {delivered.iteration.number}: test accuracy {100 * score.accuracy:.1f} %")
save_file(model.state_dict(), "exported.safetensors")
