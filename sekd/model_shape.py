"""The sizes of a causal language model, read from its configuration alone: its matrices, its attention, its head.

:mod:`sekd.flops` counts from these what a step costs. No model is built.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the layers of an architecture are built.

    Attributes:
        mlp: the names of the MLP's matrices; the last one leads back to the hidden size.
        names: the names of the attention's matrices; the last one leads back to the hidden size.
        parallel: the MLP reads what the attention reads, and not its result.
        norm_after_mlp: a norm follows the MLP's last matrix.
    """

    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    parallel: bool = False
    norm_after_mlp: bool = False


EXPERTS = Family(mlp=("experts.gate_proj", "experts.up_proj", "experts.down_proj"))
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3"), Family()),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), Family(norm_after_mlp=True)),
    **dict.fromkeys(("cohere", "cohere2"), Family(parallel=True)),
    "phi": Family(("fc1", "fc2"), ("q_proj", "k_proj", "v_proj", "dense"), parallel=True),
    "phi3": Family(("gate_up_proj", "down_proj"), ("qkv_proj", "o_proj")),
    "starcoder2": Family(("c_fc", "c_proj")),
    "gpt_neox": Family(("dense_h_to_4h", "dense_4h_to_h"), ("query_key_value", "dense"), parallel=True),
    **dict.fromkeys(("qwen3_moe", "mixtral"), EXPERTS),
}
"""The known architectures, by ``model_type``."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer: [inputs outputs], and the adapter beside it.

    Attributes:
        times: how often a token passes such a matrix: the number of its experts, else 1.
        stored: how many such matrices the layer has.
        trained: it gets a gradient.
        rank: of its LoRA adapter; 0 without one.
        stage: matrices of one stage read the same, or at least nothing that a later stage gives.
    """

    name: str
    inputs: int
    outputs: int
    times: int = 1
    stored: int = 1
    trained: bool = True
    rank: int = 0
    stage: int = 0

    @property
    def parameters(self) -> int:
        """Of the matrix itself, over all experts."""
        return self.inputs * self.outputs * self.stored

    @property
    def adapter_parameters(self) -> int:
        return (self.inputs + self.outputs) * self.rank


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its matrices in their order, and its attention; ``window`` is None for all earlier tokens."""

    matrices: tuple[Matrix, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    norm_after_mlp: bool


@dataclass(frozen=True)
class ModelShape:
    """A causal language model. ``layers`` has each kind of layer with the number of such layers.

    A tied ``head`` shares its matrix with the embeddings. ``embeddings_trained``: these get a gradient.
    """

    layers: tuple[tuple[Layer, int], ...]
    head: Matrix
    tied: bool
    embeddings_trained: bool = True

    @classmethod
    def from_config(cls, config: Any, adapter: Any = None) -> "ModelShape":
        """The shape of a model with a transformers ``config``; ``adapter`` is the LoraConfig of PEFT that it trains.

        Raises:
            ValueError: an architecture, or a kind of layer or adapter, whose arithmetic is not known.
        """
        config = config.get_text_config()
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"the cost of architecture {config.model_type!r} is not known; add it to FAMILIES of "
                "sekd/model_shape.py, or use one of " + ", ".join(FAMILIES)
            )
        family = FAMILIES[config.model_type]
        layers = [_make_layer(config, family, number) for number in range(config.num_hidden_layers)]
        head = Matrix("lm_head", config.hidden_size, config.vocab_size)
        kinds = tuple((layer, layers.count(layer)) for layer in dict.fromkeys(layers))
        shape = cls(kinds, head, bool(config.tie_word_embeddings))
        return shape if adapter is None else shape.with_adapter(adapter)

    def with_adapter(self, adapter: Any) -> "ModelShape":
        """The shape with a LoRA adapter: only the adapter is trained, and its ``modules_to_save``.

        Raises:
            ValueError: an adapter other than LoRA, or one that does not adapt all layers alike.
        """
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        uneven = [name for name in ("rank_pattern", "layers_to_transform") if getattr(adapter, name, None)]
        if kind != "LORA" or uneven:
            raise ValueError(f"the cost of a {kind} adapter with {', '.join(uneven) or 'its own layers'} is not known")
        saved = adapter.modules_to_save or []

        def adapt(matrix: Matrix) -> Matrix:
            rank = adapter.r if _is_target(adapter.target_modules, matrix.name) else 0
            return replace(matrix, trained=matrix.name in saved, rank=rank)

        layers = tuple(
            (replace(layer, matrices=tuple(map(adapt, layer.matrices))), count) for layer, count in self.layers
        )
        return replace(self, layers=layers, head=adapt(self.head), embeddings_trained="embed_tokens" in saved)

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def matrix_parameters(self) -> int:
        """Of all matrices of the layers; neither embeddings, nor head, nor adapters."""
        return sum(count * matrix.parameters for layer, count in self.layers for matrix in layer.matrices)

    @property
    def parameters(self) -> int:
        """Of matrices, embeddings, head and adapters. Norms and biases, below a thousandth of all, do not count."""
        return self.matrix_parameters + self.head.parameters * (1 if self.tied else 2) + self._count_adapters()

    @property
    def trained_parameters(self) -> int:
        """As ``parameters``, of those that get a gradient."""
        trained = sum(count * m.parameters for layer, count in self.layers for m in layer.matrices if m.trained)
        either = self.embeddings_trained or self.head.trained
        ends = either if self.tied else self.embeddings_trained + self.head.trained
        return trained + ends * self.head.parameters + self._count_adapters()

    def _count_adapters(self) -> int:
        adapted = sum(count * m.adapter_parameters for layer, count in self.layers for m in layer.matrices)
        return adapted + self.head.adapter_parameters


def _make_layer(config: Any, family: Family, number: int) -> Layer:
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    *read, back = family.names
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    fused = len(read) == 1  # one matrix for queries, keys and values
    attention = [Matrix(name, hidden, size) for name, size in zip(read, [sum(sizes)] if fused else sizes, strict=True)]
    attention.append(Matrix(back, heads * head_dim, hidden, stage=1))
    matrices = (*attention, *_make_mlp(config, family, number))
    return Layer(matrices, heads, kv_heads, head_dim, _get_window(config, number), family.norm_after_mlp)


def _make_mlp(config: Any, family: Family, number: int) -> Iterable[Matrix]:
    names, hidden, inner, experts = family.mlp, config.hidden_size, config.intermediate_size, 0
    stages = (0, 1) if family.parallel else (2, 3)
    is_dense = number in (getattr(config, "mlp_only_layers", None) or ())
    is_dense |= (number + 1) % getattr(config, "decoder_sparse_step", 1) != 0
    if family is EXPERTS and not is_dense:
        experts, inner = config.num_local_experts, getattr(config, "moe_intermediate_size", inner)
    if experts:
        yield Matrix("gate", hidden, experts, stage=stages[0])  # the router
    else:
        names = tuple(name.removeprefix("experts.") for name in names)
    many = {"times": config.num_experts_per_tok, "stored": experts} if experts else {}
    *first, last = names
    width = inner * (2 if first == ["gate_up_proj"] else 1)
    for name in first:
        yield Matrix(name, hidden, width, stage=stages[0], **many)
    yield Matrix(last, inner, hidden, stage=stages[1], **many)


def _get_window(config: Any, number: int) -> int | None:
    """The number of tokens that a token of this layer sees, itself included; None for all earlier ones."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[number] if kinds else "sliding_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise ValueError(f"the cost of {kind!r} layers ({config.model_type}) is not known")
    return getattr(config, "sliding_window", None) if kind == "sliding_attention" else None


def _is_target(targets: Any, name: str) -> bool:
    """Whether PEFT's ``target_modules`` name a matrix, by its name in any layer."""
    if targets == "all-linear":
        return name != "lm_head" and not name.startswith("experts.")
    if isinstance(targets, str):
        return any(re.fullmatch(targets, f"{path}{name}") for path in _PATHS)
    return any(name == target or f".{name}".endswith(f".{target}") for target in targets or ())


_PATHS = ("", *(f"{model}layers.0.{part}" for model in ("model.", "") for part in ("self_attn.", "mlp.")))
