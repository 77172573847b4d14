"""``EvoLFQ``: an autoencoder around :class:`LFQ` whose bits a genetic algorithm can search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bit_entropy import bits_of
from .lfq import LFQ


class Return(NamedTuple):
    reconstructed: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class Result(NamedTuple):
    """One generation: the population after it, and the best individual so far."""

    pop_bits: Tensor
    best_gene: Tensor
    best_fitness: float
    best_decoded: Tensor | None


class EvoLFQ(nn.Module):
    """Encoder, LFQ and decoder; besides reconstructing, it breeds bit strings whose decodings score best.

    Names, defaults and results are those of ``vector_quantize_pytorch.EvoLFQ``. Bits are 0 and 1, or -1 and 1 with
    ``is_sign`` and ``return_signs``, in tensors of a floating dtype.

    Args:
        encoder, decoder: modules; latents are ``[B, dim]`` or anything LFQ takes.
        lfq: the quantizer, or left out and made from ``dim``, ``codebook_size``, ``num_codebooks`` and ``lfq_kwargs``.
        pop_size, mutation_rate, tournament_size, elitism_count, generations: defaults of the methods' arguments.

    Raises:
        ValueError: neither ``lfq`` nor ``dim`` or ``codebook_size``; a population no larger than its elite.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs,
    ):
        super().__init__()
        if pop_size <= elitism_count:
            raise ValueError(f"EvoLFQ: pop_size={pop_size} must be above elitism_count={elitism_count}")
        if lfq is None and dim is None and codebook_size is None:
            raise ValueError("EvoLFQ: give lfq, or dim or codebook_size to make one")
        self.encoder, self.decoder = encoder, decoder
        if lfq is None:
            lfq = LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, **lfq_kwargs)
        self.lfq = lfq
        self.pop_size, self.mutation_rate, self.generations = pop_size, mutation_rate, generations
        self.tournament_size, self.elitism_count = tournament_size, elitism_count
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.zero.device

    def _quantize(self, x: Tensor, **kwargs):
        latents = self.encoder(x)
        one_token = latents.dim() == 2
        quantized, indices, loss = self.lfq(latents.unsqueeze(1) if one_token else latents, **kwargs)
        return (quantized.squeeze(1), indices.squeeze(1), loss) if one_token else (quantized, indices, loss)

    def forward(self, x: Tensor, **kwargs) -> Return:
        """-> ``(reconstructed, indices, entropy_aux_loss)``; ``kwargs`` go to the quantizer."""
        quantized, indices, loss = self._quantize(x, **kwargs)
        return Return(self.decoder(quantized), indices, loss)

    # data <-> bits

    @torch.no_grad()
    def encode(self, x: Tensor, return_signs: bool = False) -> Tensor:
        """The bits of x, ``[B, bits]`` or ``[B, n, bits]``, those of all codebooks together."""
        with _evaluation(self):
            indices = self._quantize(x)[1]
        if not self.lfq.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        bits = bits_of(indices, self.lfq.codebook_dim).flatten(-2).float()
        return bits * 2.0 - 1.0 if return_signs else bits

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Tensor:
        """Bits as :meth:`encode` returns them (positive: 1, others: 0) -> decoder output."""
        lfq = self.lfq
        with _evaluation(self):
            indices = ((bits > 0).unflatten(-1, (lfq.num_codebooks, lfq.codebook_dim)) * lfq.mask).sum(-1)
            return self.decoder(lfq.project_out(lfq._decode(indices).flatten(-2)))

    # genetic algorithm

    def init_random_population(
        self, pop_size: int | None = None, shape=None, device: torch.device | None = None, is_sign: bool = False
    ) -> Tensor:
        """``[pop_size, *shape]`` random bits."""
        pop_size = self.pop_size if pop_size is None else pop_size
        bits = torch.randint(0, 2, (pop_size, *shape), device=self.device if device is None else device).float()
        return bits * 2.0 - 1.0 if is_sign else bits

    def init_population_from_data(
        self, x: Tensor, pop_size: int | None = None, mutation_rate: float | None = None, is_sign: bool = False
    ) -> Tensor:
        """The bits of x, repeated or cut to ``pop_size`` individuals, mutated."""
        pop_size = self.pop_size if pop_size is None else pop_size
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        bits = self.encode(x, return_signs=is_sign)
        bits = bits.repeat(-(-pop_size // len(bits)), *[1] * (bits.dim() - 1))[:pop_size]
        return self.mutate(bits, rate, is_sign) if rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        return torch.where(torch.rand_like(parent1.float()) < 0.5, parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        flip = torch.rand_like(population.float()) < rate
        return torch.where(flip, -population if is_sign else 1.0 - population, population)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """As many winners as there are individuals, each the fittest of a few drawn at random."""
        return population[self._winners(fitnesses, (len(population),), tournament_size)]

    def _winners(self, fitnesses: Tensor, shape: tuple[int, ...], tournament_size: int | None) -> Tensor:
        size = self.tournament_size if tournament_size is None else tournament_size
        contenders = torch.randint(0, len(fitnesses), (*shape, size), device=self.device)
        return contenders.gather(-1, fitnesses[contenders].argmax(-1, keepdim=True)).squeeze(-1)

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Callable,
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """One generation: the elite, and children of two tournament winners each, crossed and mutated.

        Args:
            pop_bits: population ``[P, ...]``.
            fitness_fn: ``(decoded, pop_bits) -> [P]``, higher is better; a tensor or anything torch.tensor takes.
            batch_size: decode this many individuals at a time.

        Returns:
            The next population and the fitness ``[P]`` of the given one.
        """
        elite_count = self.elitism_count if elitism_count is None else elitism_count
        chunks = pop_bits.split(len(pop_bits) if batch_size is None else batch_size)
        fitnesses = fitness_fn(torch.cat([self.decode_bits(chunk) for chunk in chunks]), pop_bits)
        if not torch.is_tensor(fitnesses):
            fitnesses = torch.tensor(fitnesses, device=self.device, dtype=torch.float32)
        elite = pop_bits[fitnesses.argsort(descending=True)[:elite_count]].clone()
        parents = self._winners(fitnesses, (len(pop_bits) - elite_count, 2), tournament_size)
        children = self.uniform_crossover(pop_bits[parents[:, 0]], pop_bits[parents[:, 1]])
        return torch.cat([elite, self.mutate(children, mutation_rate, is_sign)]), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Callable,
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape=None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs,
    ) -> Iterator[Result]:
        """Yields a :class:`Result` after every generation; the population is ``pop_bits``, or random of ``shape``.

        Raises:
            ValueError: neither ``pop_bits`` nor ``shape``.
        """
        if pop_bits is None:
            if shape is None:
                raise ValueError("EvoLFQ.evolve: give pop_bits, or the shape of an individual")
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best_fitness, best_gene = float("-inf"), None
        for _ in range(self.generations if generations is None else generations):
            parents = pop_bits
            pop_bits, fitnesses = self.step(parents, fitness_fn, is_sign=is_sign, **step_kwargs)
            fittest = int(fitnesses.argmax())
            if fitnesses[fittest] > best_fitness:
                best_fitness, best_gene = float(fitnesses[fittest]), parents[fittest].clone()
            decoded = self.decode_bits(best_gene.unsqueeze(0)).squeeze(0) if return_best_decoded else None
            yield Result(pop_bits, best_gene, best_fitness, decoded)


@contextmanager
def _evaluation(module: nn.Module):
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
