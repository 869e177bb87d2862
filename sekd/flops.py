"""What a step costs, from the sizes of the models alone: FLOPs and bytes of each of its parts.

**FLOPs** count matrix products, two for a multiplication and an addition, as
``torch.utils.flop_counter.FlopCounterMode`` counts them. Work on single numbers (norms, softmax, the optimizer) counts
in bytes alone.
**Bytes** are what must move between memory and processor at least: each product reads its inputs and its matrix and
writes its outputs once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sekd.model_shape import Layer, Matrix, ModelShape


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time on a machine of these rates, if it computes and moves at once."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch, and what a run does with it.

    Attributes:
        sequences: B.
        tokens: T, padding included.
        positions: valid positions, of all sequences.
        chosen: distilled positions, of all sequences.
        teacher_tokens: T of the teacher's own context; None if it is the student's.
        scores_student: the student's head runs over all valid positions.
        scores_teacher: the teacher's head does, too.
        looks_back: the policy computes the divergence of the chosen positions again, after the step.
        loss_classes: the classes of the student's head in the loss; None for all.
        logit_passes: how often the loss computes the student's logits: 2 if it cannot take gradients at once.
        target_passes: how often it computes the teacher's.
        checkpointing: the backward pass computes the layers again (``gradient_checkpointing``).
        skips_masked: attention does not compute what its mask hides, as a floor does not. Without a fused kernel it
            computes all pairs of tokens.
        chunk_rows: positions that the loss computes at once.
        compute_bytes: of a number that products read and write.
    """

    sequences: int
    tokens: int
    positions: float
    chosen: float
    teacher_tokens: int | None = None
    scores_student: bool = False
    scores_teacher: bool = False
    looks_back: bool = False
    loss_classes: int | None = None
    logit_passes: int = 1
    target_passes: int = 1
    checkpointing: bool = False
    skips_masked: bool = True
    chunk_rows: int = 256
    compute_bytes: float = 4.0

    def with_positions(self, positions: float, chosen: float) -> "BatchShape":
        """The same micro-batch with these numbers of valid and of distilled positions."""
        return replace(self, positions=positions, chosen=chosen)


def batch_cost(student: ModelShape, teacher: ModelShape | None, batch: BatchShape) -> dict[str, Cost]:
    """A micro-batch, by part. Without a teacher its targets come from a cache.

    ``student`` is the forward pass of its backbone, ``backward`` the backward pass. ``teacher`` is its backbone.
    ``scoring`` runs heads over all valid positions. ``loss`` is the heads at the chosen positions, with gradients.
    """
    B, T, T2 = batch.sequences, batch.tokens, batch.teacher_tokens or batch.tokens
    size = batch.compute_bytes
    forward = backbone_forward(student, B, T, batch.skips_masked, size)
    chunks = max(1.0, batch.chosen / batch.chunk_rows)
    head, classes = student.head, batch.loss_classes or student.head.outputs
    loss = matrix_forward(head, batch.chosen, size, chunks, classes) * batch.logit_passes
    loss += matrix_backward(head, batch.chosen, True, size, chunks, classes)
    costs = {
        "teacher": Cost(),
        "student": forward,
        "scoring": matrix_forward(head, batch.positions, size) * batch.scores_student,
        "loss": loss,
        "backward": backbone_backward(student, B, T, batch.skips_masked, size, batch.checkpointing),
    }
    if batch.looks_back:
        costs["scoring"] += forward + matrix_forward(head, batch.chosen, size)
    if teacher is not None:
        costs["teacher"] = backbone_forward(teacher, B, T2, batch.skips_masked, size)
        costs["scoring"] += matrix_forward(teacher.head, batch.positions, size) * batch.scores_teacher
        costs["scoring"] += matrix_forward(teacher.head, batch.chosen, size) * batch.looks_back
        costs["loss"] += matrix_forward(teacher.head, batch.chosen, size, chunks) * batch.target_passes
    return costs


def generation_cost(
    model: ModelShape,
    sequences: float,
    prompt: float,
    completion: float,
    compute_bytes: float = 4.0,
    skips_masked: bool = True,
) -> Cost:
    """One round of ``sequences`` completions with a key-value cache, all at once.

    The prompts are read in one pass. Each later pass reads every matrix, and the cache, for one token a sequence.
    """
    prefill = backbone_forward(model, sequences, prompt, skips_masked, compute_bytes)
    passes = max(completion - 1, 0)
    decoding = Cost()
    for layer, count in model.layers:
        for matrix in layer.matrices:
            decoding += matrix_forward(matrix, sequences, compute_bytes) * (count * passes)
        seen = _count_seen(prompt, completion, layer.window)
        cache = 2 * layer.kv_heads * layer.head_dim * compute_bytes
        decoding += Cost(_pair_flops(layer) * sequences * seen, cache * sequences * seen) * count
    return prefill + decoding + matrix_forward(model.head, sequences, compute_bytes) * completion


def optimizer_cost(model: ModelShape, state_bytes: float = 8.0) -> Cost:
    """An update of all trained parameters in float32. ``state_bytes`` is the state of each: 8 for AdamW, 2 in 8 bits.

    The gradient's norm reads the gradients once more.
    """
    return Cost(0.0, model.trained_parameters * (4 * 4 + 2 * state_bytes))


def sync_cost(model: ModelShape, weight_bytes: float = 2.0) -> Cost:
    """Sending a student's weights to an engine: an adapter alone, if it trains one."""
    adapted = model.parameters if model.head.trained else model.trained_parameters
    return Cost(0.0, 2 * adapted * weight_bytes)


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum of all parts."""
    return sum(costs.values(), Cost())


# Parts of models


def backbone_forward(
    model: ModelShape, sequences: float, tokens: float, skips_masked: bool = True, compute_bytes: float = 4.0
) -> Cost:
    """All layers over [sequences tokens]: from the embeddings to the last hidden states."""
    return sum(
        (_layer_forward(layer, sequences, tokens, skips_masked, compute_bytes) * n for layer, n in model.layers), Cost()
    )


def backbone_backward(
    model: ModelShape,
    sequences: int,
    tokens: int,
    skips_masked: bool = True,
    compute_bytes: float = 4.0,
    checkpointing: bool = False,
) -> Cost:
    """The gradients of all layers. With ``checkpointing``, each layer's forward pass runs again before."""
    # transformers lets the embeddings require a gradient then, even if it is not used.
    cost, first = Cost(), not model.embeddings_trained and not checkpointing
    for layer, count in model.layers:
        whole = _layer_backward(layer, sequences, tokens, skips_masked, compute_bytes)
        cost += whole * count
        if first:  # nothing below the first adapter needs a gradient
            cost += _layer_backward(layer, sequences, tokens, skips_masked, compute_bytes, is_first=True) + whole * -1
            first = False
        if checkpointing:
            again = _layer_forward(layer, sequences, tokens, skips_masked, compute_bytes)
            cost += (again + _last_product(layer, sequences * tokens, compute_bytes) * -1) * count
    return cost


def matrix_forward(
    matrix: Matrix, rows: float, compute_bytes: float = 4.0, chunks: float = 1.0, outputs: int | None = None
) -> Cost:
    """``rows`` tokens times a matrix, and its adapter. The matrix is read once a chunk."""
    whole = _product(rows, matrix.inputs, outputs or matrix.outputs, compute_bytes, chunks) * matrix.times
    return whole + _adapter_product(matrix, rows, compute_bytes)


def matrix_backward(
    matrix: Matrix,
    rows: float,
    needs_input: bool,
    compute_bytes: float = 4.0,
    chunks: float = 1.0,
    outputs: int | None = None,
) -> Cost:
    """The gradients of a trained matrix, of its adapter, and with ``needs_input`` of its input."""
    whole = _product(rows, matrix.inputs, outputs or matrix.outputs, compute_bytes, chunks) * matrix.times
    adapter = _adapter_product(matrix, rows, compute_bytes)
    # Without a gradient of its input, the adapter's first matrix still needs its own.
    first = _product(rows, matrix.inputs, matrix.rank, compute_bytes)
    return whole * (needs_input + matrix.trained) + adapter * 2 + first * -(not needs_input)


def _layer_forward(layer: Layer, sequences: float, tokens: float, skips_masked: bool, size: float) -> Cost:
    products = sum((matrix_forward(matrix, sequences * tokens, size) for matrix in layer.matrices), Cost())
    return products + _attention(layer, sequences, tokens, skips_masked, size)


def _layer_backward(
    layer: Layer, sequences: int, tokens: int, skips_masked: bool, size: float, is_first: bool = False
) -> Cost:
    """``is_first``: what the layer reads needs no gradient."""
    adapted = [m.stage for m in layer.matrices if m.rank or m.trained]
    start = min(adapted, default=4) if is_first else -1
    cost = Cost()
    for matrix in layer.matrices:
        if matrix.stage >= start:
            cost += matrix_backward(matrix, sequences * tokens, matrix.stage > start, size)
    attention = _attention(layer, sequences, tokens, skips_masked, size) * 2
    return cost + attention * (start < 1)


def _last_product(layer: Layer, rows: float, size: float) -> Cost:
    """What checkpointing does not compute again: nothing but the layer's result reads it."""
    last = layer.matrices[-1]
    if layer.norm_after_mlp:
        return Cost()
    return _product(rows, last.rank or last.inputs, last.outputs, size) * last.times


def _attention(layer: Layer, sequences: float, tokens: float, skips_masked: bool, size: float) -> Cost:
    pairs = count_pairs(tokens, layer.window) if skips_masked else tokens**2
    moved = 2 * (layer.heads + layer.kv_heads) * layer.head_dim * tokens * size  # queries, results, keys, values
    return Cost(_pair_flops(layer) * pairs, moved) * sequences


def _pair_flops(layer: Layer) -> float:
    """Of a query and a key that it sees: their product, and the value's share."""
    return 4 * layer.heads * layer.head_dim


def count_pairs(tokens: float, window: int | None = None) -> float:
    """How many tokens the tokens of a sequence see together, each itself and at most ``window`` - 1 before it."""
    within = tokens if window is None else min(tokens, window)
    return within * (within + 1) / 2 + (tokens - within) * within


def _count_seen(prompt: float, completion: float, window: int | None) -> float:
    """How many tokens those passes see that read one token each: all of a completion but its last token."""
    return count_pairs(prompt + max(completion - 1, 0), window) - count_pairs(prompt, window)


def _product(rows: float, inputs: int, outputs: int, size: float, chunks: float = 1.0) -> Cost:
    moved = rows * (inputs + outputs) + chunks * inputs * outputs
    return Cost(2 * rows * inputs * outputs, moved * size)


def _adapter_product(matrix: Matrix, rows: float, size: float) -> Cost:
    if not matrix.rank:
        return Cost()
    return _product(rows, matrix.inputs, matrix.rank, size) + _product(rows, matrix.rank, matrix.outputs, size)
