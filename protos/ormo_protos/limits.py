"""The one table of what the contract allows: numbers, the pattern of ids, and phases, as the `.proto` states them.

A test holds each of them to its sentence in `parameter_server.proto`: neither changes without the other. Nothing is
imported here, so that all else can import it.
"""

# The model

MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 16
# Of a tensor and of a section. 1 PiB of float32: far beyond any machine, and whatever is computed from it (bytes,
# offsets, vectors) stays in an int64.
MAX_ELEMENTS = 2**48
# Of the part of a manifest that one message carries, so that it fits with all that a message may have besides.
MAX_PART_BYTES = 2 << 20
# A manifest in crumbs would keep all others waiting for the model: parts that any manifest may come in, and tensors for
# each part more.
FREE_PARTS = 64
TENSORS_PER_PART = 100

# A payload

# What senders use, 1.25 MiB. Measured: 256 KiB costs a third more per byte (a message is three hand-offs between
# threads); 2 MiB takes 2 to 8 % longer at 45 and 400 MB, and 0.05 of a model more memory for each of 16 exchanges of 45
# MB; with 1 MiB the paper's ResNet-20 would be two messages.
CHUNK_BYTES = 5 << 18
MAX_CHUNK_BYTES = 4 << 20
# A payload in crumbs would keep a thread busy for hours: chunks that any payload may come in, and bytes for each chunk
# more.
FREE_CHUNKS = 64
BYTES_PER_CHUNK = 16 << 10
# Of DTYPE_INT8: values that share a scale, and the largest code.
INT8_BLOCK_ELEMENTS = 1024
INT8_LARGEST = 127

# Messages

# gRPC refuses longer ones unread. 64 KiB are what a message may add to its chunk.
MAX_MESSAGE_BYTES = MAX_CHUNK_BYTES + (64 << 10)
# Of a request that is one message: it has no tensor and no manifest. Without lists nothing of this size can do harm.
SMALL_MESSAGE_BYTES = 16 << 10
# A field that is no list may come again, and the last one counts; yet where two of a `oneof` take turns, each is a new
# object. No writer does so; a newer version may write fields that are not known here. To count this many of each field
# takes 20 ms.
MAX_REPEATS = 1_000
# Every repeated field and every map of the contract is here, or the programs don't start.
LONGEST_LISTS = {
    "ormo.v1.Manifest.tensors": MAX_TENSORS,
    "ormo.v1.TensorSpec.shape": MAX_DIMENSIONS,
    # A worker has `MAX_SLOTS` tickets at most; what it returns may have gathered while the server was away.
    "ormo.v1.HeartbeatRequest.returned": 64,
    # More than a server has threads for, and than anybody reads in a terminal.
    "ormo.v1.GetStatusResponse.workers": 10_000,
    "ormo.v1.GetStatusResponse.refusals": 1_000,
}

# Workers

# The pattern of a worker's id, and the same in words.
WORKER_ID = r"[A-Za-z0-9._-]{1,128}"
WORKER_ID_IN_WORDS = "1 to 128 of the characters A-Z a-z 0-9 . _ -"
# In-flight places, so also gradients that a worker may have in flight.
MAX_SLOTS = 16
# Of one gradient, so that the run's count of them stays far below what an int64 holds.
MAX_SAMPLES = 2**31 - 1
# Some thirty years.
MAX_COMPUTE_SECONDS = 1e9

# What the server is doing, as logs, metrics and tables say it, by the numbers of `GetStatusResponse.Phase`.
PHASES = {
    1: "waiting_for_model",
    2: "waiting_for_workers",
    3: "training",
    4: "finished",
    5: "draining",
}
