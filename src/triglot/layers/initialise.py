"""How weights begin."""

from collections.abc import Iterator

from torch import Tensor, nn

from triglot.layers.moe import MixtureOfExperts


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """Every projection's matrix, each expert's on its own."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight
        elif isinstance(module, MixtureOfExperts):
            yield from module.inner.unbind()
            yield from module.outer.unbind()


def zero_biases(model: nn.Module) -> None:
    """Set every bias of a projection to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, MixtureOfExperts) and module.inner_bias is not None and module.outer_bias is not None:
            nn.init.zeros_(module.inner_bias)
            nn.init.zeros_(module.outer_bias)


def xavier(model: nn.Module, embedding_std: float) -> None:
    """Projections by Glorot & Bengio 2010, eq. 16; embeddings from N(0, embedding_std²); biases zero."""
    for matrix in matrices(model):
        nn.init.xavier_uniform_(matrix)
    _embeddings(model, embedding_std)
    zero_biases(model)


def normal(model: nn.Module, std: float) -> None:
    """Projections and embeddings from N(0, std²) (Radford et al. 2019); biases zero."""
    for matrix in matrices(model):
        nn.init.normal_(matrix, std=std)
    _embeddings(model, std)
    zero_biases(model)


def _embeddings(model: nn.Module, std: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
