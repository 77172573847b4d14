"""The codewords of a quantizer, and everything that changes them: k-means start, EMA, revival of dead codewords."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import codeword_sums, kmeans
from .tokens import transformed

_PLUS_PLUS = 1024  # k-means++ makes one pass over the rows per codeword; beyond this the start is random rows


class Codebook(nn.Module):
    """``embed`` ``[H, K, D]`` with its running statistics ``cluster_size`` ``[H, K]`` and ``embed_avg`` ``[H, K, D]``.

    The state stays float32 (or float64) whatever the model is cast to: an exponential moving average in half precision
    stops moving once a step is smaller than the spacing of the numbers.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        use_cosine_sim: bool = False,
        sync_codebook: bool | None = None,
        sync_kmeans: bool = True,
        vq_bridge: nn.Module | None = None,
    ):
        super().__init__()
        self.dim, self.codebook_size, self.num_codebooks = dim, codebook_size, num_codebooks
        self.decay, self.eps, self.kmeans_iters = decay, eps, kmeans_iters
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.learnable_codebook = learnable_codebook
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        self.sync_codebook, self.sync_kmeans = sync_codebook, sync_kmeans
        self.expire_after_update = True  # a shared residual codebook expires once per forward, not once per level

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            if use_cosine_sim:
                embed = normalize(embed)
        self.vq_bridge = vq_bridge
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # `initted` as Python sees it: reading the buffer would be a host sync and a graph break in every forward
        self.needs_init = kmeans_init
        self._pending: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"heads={self.num_codebooks}, codewords={self.codebook_size}, dim={self.dim}"

    # state

    def _apply(self, fn, recurse=True):
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            narrowed = out.is_floating_point() and torch.finfo(out.dtype).bits < 32 <= torch.finfo(t.dtype).bits
            return t.to(out.device) if narrowed else out

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.needs_init = not bool(self.initted)

    @property
    def keeps_statistics(self) -> bool:
        """Whether a training step counts and sums: for EMA, or to find dead codewords."""
        return bool(self.ema_update or self.threshold_ema_dead_code)

    def codewords(self, dtype: torch.dtype, snapshot: bool) -> Tensor:
        """What vectors are compared with and replaced by: ``[H, K, D]``, in the precision of the computation.

        ``snapshot``: a copy, because the EMA step of this very forward rewrites ``embed`` before backward reads it.
        """
        embed = self.embed if self.learnable_codebook else self.embed.detach()
        embed = embed.to(dtype)
        embed = _snapshot(embed) if snapshot else embed
        if self.vq_bridge is not None:
            with torch.autocast(embed.device.type, enabled=False):
                embed = self.vq_bridge(embed).to(dtype)
        # EMA leaves unit vectors, a gradient step does not
        return normalize(embed) if self.use_cosine_sim and self.learnable_codebook and not self.ema_update else embed

    def observe(self, z: Tensor, mask: Tensor | None) -> None:
        """Sees z ``[H, N, D]``, mask ``[H, N]`` before the codewords are asked for; nothing to do here."""

    # k-means start

    @torch.no_grad()
    def init_(self, z: Tensor, mask: Tensor | None) -> None:
        """Seeds the codewords from the first batch that has a usable row; z ``[H, N, D]``, mask ``[H, N]``."""
        if not self.needs_init:
            return
        if transformed(z):
            raise RuntimeError("kmeans_init cannot start under torch.vmap: call the layer on a first batch before")
        if bool(self.initted):
            self.needs_init = False
            return
        usable = z.isfinite().all(-1) if mask is None else z.isfinite().all(-1) & mask
        heads = [rows[ok] for rows, ok in zip(z.detach(), usable, strict=True)]
        if self._world() > 1 and self.sync_kmeans:
            heads = [_gather(rows.unsqueeze(0))[0] for rows in heads]
        embed, size = torch.zeros_like(self.embed), torch.zeros_like(self.cluster_size)
        found = all(len(rows) > 0 for rows in heads)
        if found:
            seeds, sizes = zip(*(self._seed(rows) for rows in heads), strict=True)
            embed, size = torch.stack(seeds).to(embed.dtype), torch.stack(sizes).to(size.dtype)
        if self._world() > 1:  # without sync_kmeans, the first process seeds from its own rows for all
            found = bool(_from_first(torch.tensor(found, dtype=torch.int32, device=z.device)))
            _from_first(embed), _from_first(size)
        if not found:
            return
        if self.use_cosine_sim:
            embed = normalize(embed)
        self.embed.copy_(embed)
        self.cluster_size.copy_(size)
        self.embed_avg.copy_(embed * size.unsqueeze(-1))
        self.initted.fill_(True)
        self.needs_init = False

    def _seed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """K codewords from rows [N, D], and how many rows each holds (at least 1, as in a fresh codebook)."""
        K, N = self.codebook_size, len(rows)
        if N >= K:
            init = "k-means++" if K <= _PLUS_PLUS else "random"
            # the draw comes from torch's own generator, so torch.manual_seed decides it
            found = kmeans(rows, K, init=init, iters=self.kmeans_iters, seed=int(torch.randint(2**31, ())))
            counts = torch.bincount(found.indices, minlength=K)
            return found.centroids, counts.clamp(min=1).to(rows.dtype)
        # fewer rows than codewords: every row is a codeword, the rest start beside rows so that no two are the same
        extra = rows[torch.randint(N, (K - N,)).to(rows.device)]
        spread = 1e-2 * rows.square().mean().sqrt().clamp(min=1e-3)
        return torch.cat([rows, extra + spread * torch.randn_like(extra)]), rows.new_ones(K)

    # training by exponential moving average

    @torch.no_grad()
    def update(
        self,
        z: Tensor,
        indices: Tensor,
        *,
        weight: Tensor | Callable | None = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One EMA step from z ``[H, N, D]`` and its indices ``[H, N]``. No host sync.

        Rows with index -1 (masked, non-finite) take no part; a batch without a usable row changes nothing.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and not self.threshold_ema_dead_code:
            return
        check_step(indices, self.cluster_size)
        z, indices = self._join(z, indices)
        sums, counts = codeword_sums(z, indices, self.codebook_size)
        sums, counts = sums.to(self.embed_avg.dtype), counts.to(self.cluster_size.dtype)
        if self._world() > 1 and not self._joins():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if callable(weight):
            weight = weight(sums, counts)
        if self._pending is not None:
            counts, sums = counts + self._pending[0], sums + self._pending[1]
        self._pending = (counts, sums) if accumulate else None
        if accumulate:
            return
        moved = counts.sum(-1, keepdim=True) > 0
        step = (1.0 - self.decay) * moved.to(counts.dtype)
        if weight is not None:
            step = step * self._row_weight(torch.as_tensor(weight, device=counts.device))
        self.cluster_size.lerp_(counts, step)
        self.embed_avg.lerp_(sums, step.unsqueeze(-1))
        if ema_update and not self.manual_ema_update:
            self.update_ema(moved)
        if self.expire_after_update:
            self._expire(z, indices)

    def _row_weight(self, weight: Tensor) -> Tensor:
        shapes = ((), (self.codebook_size,), (self.num_codebooks, self.codebook_size))
        if weight.shape not in shapes:
            raise ValueError(f"ema_update_weight is {tuple(weight.shape)}; allowed: {', '.join(map(str, shapes))}")
        return weight

    @torch.no_grad()
    def update_ema(self, moved: Tensor | None = None) -> None:
        """Codeword = mean of its vectors, with Laplace-smoothed counts; heads ``[H, 1]`` not moved keep theirs."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        embed = self.embed_avg / smoothed.unsqueeze(-1)
        embed = normalize(embed) if self.use_cosine_sim else embed
        self.embed.copy_(embed if moved is None else torch.where(moved.unsqueeze(-1), embed, self.embed))

    @torch.no_grad()
    def expire_(self, z: Tensor, indices: Tensor) -> None:
        """Moves codewords whose running count fell below the threshold onto distinct random rows of the batch.

        Count, sum and codeword are reset together; were the sum left behind, the next EMA step would bring the dead
        codeword back. More dead codewords than rows: a random part of them waits for a later batch. No host sync.
        """
        self._expire(*self._join(z, indices))

    def _expire(self, z: Tensor, indices: Tensor) -> None:
        if not self.threshold_ema_dead_code or not self.training:
            return
        if z.shape[1] == 0:  # other processes may have rows, and wait for this one
            z, indices = z.new_zeros(z.shape[0], 1, z.shape[2]), indices.new_full((z.shape[0], 1), -1)
        H, N, K = *z.shape[:2], self.codebook_size
        dead = self.cluster_size < self.threshold_ema_dead_code
        # Keys in [0, 1) for those who take part, 2 for the others: the smallest keys are a random draw of the former.
        # The dead codeword that comes j-th in a random order gets the j-th row of a random order.
        place = torch.rand_like(self.cluster_size).masked_fill(~dead, 2.0).argsort(-1).argsort(-1)
        draw = torch.rand(H, N, device=z.device)
        if self._world() > 1:
            _from_first(place)
            draw = _from_first(draw) if self._joins() else draw
        key = torch.full((H, max(N, K)), 2.0, device=z.device)
        key[:, :N] = draw.masked_fill(indices < 0, 2.0)
        key, row = key.topk(K, -1, largest=False, sorted=True)
        found = key.gather(-1, place) < 1.0
        row = row.gather(-1, place).clamp(max=N - 1)
        fresh = torch.stack([rows.index_select(0, i) for rows, i in zip(z, row, strict=True)]).to(self.embed.dtype)
        fresh = normalize(fresh) if self.use_cosine_sim else fresh
        if self._world() > 1 and not self._joins():
            fresh, found = self._share(place, fresh, found)
        replace = dead & found
        reset = float(self.threshold_ema_dead_code)
        self.cluster_size.masked_fill_(replace, reset)
        self.embed.copy_(torch.where(replace.unsqueeze(-1), fresh, self.embed))
        self.embed_avg.copy_(torch.where(replace.unsqueeze(-1), fresh * reset, self.embed_avg))

    # many processes

    def _world(self) -> int:
        """Processes that share this codebook, decided at run time: their group may start after the layer is built."""
        if self.sync_codebook is False or not dist.is_available() or not dist.is_initialized():
            return 1
        return dist.get_world_size()

    def _joins(self) -> bool:
        """With ``torch.use_deterministic_algorithms(True)`` every process sees the rows of all, in rank order, and does
        what one process would with the joined batch, bit for bit. Otherwise only sums and counts travel, and the sums
        agree to rounding."""
        return self._world() > 1 and torch.are_deterministic_algorithms_enabled()

    def _join(self, z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return (_gather(z), _gather(indices)) if self._joins() else (z, indices)

    def _share(self, place: Tensor, fresh: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """The same replacements on every process: the j-th comes from process j modulo their number."""
        use = found & (place % dist.get_world_size() == dist.get_rank())
        fresh, found = torch.where(use.unsqueeze(-1), fresh, 0.0), use.to(torch.int32)
        dist.all_reduce(fresh)
        dist.all_reduce(found)
        return fresh, found > 0


def check_step(x: Tensor, state: Tensor) -> None:
    """Before a step that x makes on the state."""
    if transformed(x) and not transformed(state):
        raise RuntimeError(
            "torch.vmap and torch.func.grad cannot make the step that changes the codebook in training (affine_param: "
            "always): call eval(), set freeze_codebook=True, or hand the buffers in, too, with "
            "torch.func.functional_call"
        )


def _snapshot(t: Tensor) -> Tensor:
    return _opaque_copy(t) if torch.compiler.is_compiling() else t.clone()


@torch.library.custom_op("vqkernels::opaque_copy", mutates_args=())
def _opaque_copy(t: Tensor) -> Tensor:
    """A copy that the compiler leaves alone: it may save a buffer for backward in the place of its plain copy, although
    the graph writes into the buffer afterwards (torch 2.13)."""
    return t.clone()


_opaque_copy.register_fake(torch.empty_like)
_opaque_copy.register_autograd(lambda ctx, grad: grad)


def normalize(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1, eps=1e-6)


def _from_first(t: Tensor) -> Tensor:
    """The first process's t, in place on every other."""
    dist.broadcast(t, 0)
    return t


def _gather(t: Tensor) -> Tensor:
    """All processes' t ``[H, N_i, ...]``, joined along N in rank order; the numbers of rows may differ."""
    sizes = [torch.zeros(1, dtype=torch.long, device=t.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([t.shape[1]], device=t.device))
    longest = max(int(s) for s in sizes)
    padded = t.new_zeros(t.shape[0], longest, *t.shape[2:])
    padded[:, : t.shape[1]] = t
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, : int(s)] for part, s in zip(parts, sizes, strict=True)], 1)
