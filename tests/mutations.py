"""Breaks the sources on purpose, one mutation at a time in a copy of the tree, and reports which test catches each.

    python tests/mutations.py [WORD ...]     all mutations, or those whose name contains a word

A surviving mutation is a hole in the tests (exit code 1). Kernel mutations are compiled incrementally in the copy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import recommend_mutations
import search_mutations
import trie_mutations

ROOT = Path(__file__).parents[1]

# name: file, what stands there (a regular expression), what replaces it, the tests that should notice
KERNEL, OPS, GRADIENTS = "tests/test_nearest_codeword.py", "tests/test_ops.py", "tests/test_gradients.py"
SIMVQ, FSQ, LATENT = "tests/test_layers_simvq.py", "tests/test_layers_fsq.py", "tests/test_layers_latent.py"
LAYER = "tests/test_triton_check.py"
LFQ, LFQ_BESIDE = "tests/test_layers_lfq.py", "tests/test_layers_lfq_differential.py"
LFQ_RELATIVES = "tests/test_layers_lfq_relatives.py"
CODEBOOK, LAYERS = "tests/test_codebook.py", "tests/test_layers.py"
PROCESSES = "tests/test_layers_distributed.py"
MAPPED, VMAP = "vqkernels/reference/vmap.py", "tests/test_layers_vmap.py"
RVQ, RESIDUAL, GROUPED = (
    "vqkernels/layers/residual_vq.py",
    "tests/test_layers_residual.py",
    "tests/test_layers_residual_grouped.py",
)
RESIDUAL_BESIDE = "tests/test_layers_residual_differential.py"
OPTIONS, FORMULAS, OPTIONS_BESIDE = (
    f"tests/test_layers_options{name}.py" for name in ("", "_formulas", "_differential")
)
VQ, CHOICE, LOSSES = (f"vqkernels/layers/{name}.py" for name in ("vector_quantize", "choice", "losses"))
DRIVER = "tests/test_cpp.py"
SEARCH, CANONICAL = "csrc/cpu/nearest_codeword_kernel.h", "csrc/cpu/nearest_codeword_canonical.h"
SMALL = "tests/interpreted_ops.py::"
CERTIFIED = "tests/test_triton_nearest_codeword.py::test_search_in_the_interpreter"
TUNING, REPORT = "tests/test_tuning.py", "tests/test_triton_report.py"
RESIDUALS = "triton_kernels/residual_quantize.py"
ON_RESIDUALS = "tests/test_triton_residual_quantize.py::test_in_the_interpreter"
TRAIN, ON_TRAIN, ON_MODELS = "vqkernels/images/train.py", "tests/test_images_train.py", "tests/test_images_models.py"
KILLED = f"{ON_TRAIN}::test_a_killed_run_goes_on_as_if_nothing_had_happened"
GAN, PRIOR = "vqkernels/models/vqgan.py", "vqkernels/models/prior.py"
MUTATIONS = {
    "rotation trick becomes straight-through": (
        "vqkernels/ops/rotation_trick.py", r"ctx\.estimator = estimator", "ctx.estimator = 0", GRADIENTS),
    "fused rotation becomes straight-through": (
        "vqkernels/ops/residual_quantize.py", r"ctx\.estimator, ctx\.per_level, ctx\.beta = estimator,", "ctx.estimator, ctx.per_level, ctx.beta = 0,", GRADIENTS),
    "no gradient to the encoder": (
        "vqkernels/ops/residual_quantize.py", r"if ctx\.needs_input_grad\[0\]:", "if False:", GRADIENTS),
    "no codebook gradient": (
        "vqkernels/ops/residual_quantize.py", r"grads\[level\] = grad\.to", "grads[level] = 0 * grad.to", GRADIENTS),
    "commitment gradient without beta": (
        "vqkernels/ops/residual_quantize.py", r"\(ctx\.beta \* scale\)", "scale", GRADIENTS),
    "kernel: R instead of its transpose": (
        "csrc/cpu/estimator_kernel.h", r"\? 2 \* qg : 0", "? 2 * zg : 0", OPS),
    "kernel: last row of the rotation is skipped": (
        "csrc/cpu/rotation_trick_kernel.h", r"n < end; \+\+n\)", "n < end - 1; ++n)", OPS),
    "kernel: farthest codeword": (
        CANONICAL, r"const bool better = \(cost\[j\] < best\)", "const bool better = (cost[j] > best)", OPS),
    "kernel: ties go to the highest index": (
        CANONICAL, r"\(code\[j\] < best_code\)", "(code[j] > best_code)", KERNEL),
    "kernel: no error bound": (
        SEARCH, r"static_cast<float>\(2 \* eps\) : 0\.0f", "0.0f : 0.0f", KERNEL),
    "kernel: panels behind bytes lack the last": (
        "csrc/cpu/nearest_codeword.cpp", r"pack\(cb, 0, cb\.panels_count\)", "pack(cb, 0, cb.panels_count - 1)", DRIVER),
    "kernel: integers lose their error bound": (
        "csrc/include/vqk/error_bound.h", r"const double lost = z_error \* c_norm \+", "const double lost = 0 * z_error + 0 *", KERNEL),
    "kernel: integers lose the last feature": (
        "csrc/cpu/nearest_codeword_integer.h", r"d < D && norm > 0 \? static", "d < D - 1 && norm > 0 ? static", KERNEL),
    "kernel: last panel is skipped": (
        SEARCH, r"const int64_t last = first \+ block < cb\.panels_count \? first \+ block : cb\.panels_count;",
        "const int64_t last = first + block < cb.panels_count ? first + block : cb.panels_count - (cb.panels_count > 1);", OPS),
    "kernel: sums lose a chunk's last row": (
        "csrc/cpu/codeword_sums.cpp", r"for \(int64_t n = c \* job\.chunk; n < end; \+\+n\)\n", "for (int64_t n = c * job.chunk; n < end - 1; ++n)\n", CODEBOOK),
    "kernel: sums lose a slice's last row": (
        "csrc/cpu/codeword_sums_kernel.h", r"n < slice\.last; \+\+n", "n < slice.last - 1; ++n", CODEBOOK),
    "kernel: a slice's last row is not counted": (
        "csrc/cpu/codeword_sums_kernel.h", r"if \(slice\.counts\) \+\+", "if (slice.counts && n != slice.last - 1) ++", CODEBOOK),
    "kernel: sums lose a run": (
        "csrc/cpu/codeword_sums.cpp", r"run < job\.runs; \+\+run", "run < job.runs - 1; ++run", CODEBOOK),
    "kernel: k-means++ takes the worst candidate": (
        "csrc/cpu/kmeans_plus_plus.cpp", r"if \(potential < lowest\)", "if (potential > lowest || k < 0)", OPS),
    "kernel: k-means++ skips rows too soon": (
        "csrc/cpu/kmeans_plus_plus_kernel.h", r">= 4\.0 \*", ">= 1.0 *", OPS),
    "kernel: fsq loses a level": (
        "csrc/cpu/fsq.cpp", r"for \(int64_t v = 1; v < L &&", "for (int64_t v = 2; v < L &&", OPS),
    "kernel: fsq backward without its slope": (
        "csrc/cpu/fsq_kernel.h", r"load8\(g \+ i\) \* load8\(&t\.slope\[phase \* kFsqLanes\]\) \*", "load8(g + i) *", OPS),
    "k-means: means are not divided": (
        "vqkernels/ops/kmeans.py", r"sums / counts\.clamp\(min=1\)\.unsqueeze\(-1\)", "sums", CODEBOOK),
    "interpreter: a race passes": (
        "tests/triton_check.py", r'"store": \{"loads": read, "stores": wrote, "updates": updated\}', '"store": {}', LAYER),
    "interpreter: unwritten memory may be read": (
        "tests/triton_check.py", r"elif not fresh\.written\[bytes_\]\.all\(\):", "elif False:", LAYER),
    "interpreter: casts to bfloat16 truncate": (
        "tests/triton_arithmetic.py", r"np\.uint32\(0x7FFF\) \+ \(\(bits >> 16\) & 1\)", "np.uint32(0)", LAYER),
    "interpreter: tensor cores are exact": (
        "tests/triton_arithmetic.py", r"if value\.dtype != np\.float32:", "if True:", LAYER),
    "usage: masked rows are counted": (
        "vqkernels/reference/codebook_usage.py", r"indices < 0, codebook_size, indices", "indices < 0, 0, indices", OPS),
    "trie: a dead beam lives": (
        "vqkernels/reference/trie_topk.py", r"\(states >= 0\) &", "(states >= -1) &", CODEBOOK),
    "layer: EMA without division": (
        "vqkernels/layers/codebook.py", r"self\.embed_avg / smoothed\.unsqueeze\(-1\)", "self.embed_avg", LAYERS),
    "layer: decay is ignored": (
        "vqkernels/layers/codebook.py", r"step = \(1\.0 - self\.decay\)", "step = 1.0", LAYERS),
    "layer: dead codewords never expire": (
        "vqkernels/layers/codebook.py", r"if not self\.threshold_ema_dead_code or", "if True or", LAYERS),
    "layer: commitment loss times three": (
        VQ, r"orthogonal = commitment \*", "orthogonal = 3 * commitment *", LAYERS),
    "layer: commitment loss of topk times three": (
        VQ, r"loss = commitment \* self", "loss = 3 * commitment * self", "tests/test_layers_differential.py"),
    "layer: gradients reach the input although not routed": (
        CHOICE, r"z\.requires_grad and self\.route", "z.requires_grad", OPTIONS_BESIDE),
    "layer: codes are not sampled": (
        CHOICE, r"scores \+ gumbel_noise\(scores\)", "scores", FORMULAS),
    "layer: Gumbel weights without the noise of the choice": (
        CHOICE, r"\(noisy / sampling\.temperature", "(logits / sampling.temperature", FORMULAS),
    "layer: no gradient through the Gumbel weights": (
        CHOICE, r"codes \+ \(mean - mean\.detach\(\)\)", "codes", FORMULAS),
    "layer: directional output does not train the codewords": (
        CHOICE, r"error\.norm\(dim=-1", "error.detach().norm(dim=-1", FORMULAS),
    "layer: the nearest candidates are the farthest": (
        CHOICE, r"return -torch\.nn\.functional\.pairwise", "return torch.nn.functional.pairwise", OPTIONS_BESIDE),
    "layer: diversity loss with the wrong sign": (
        LOSSES, r"= \(mean \* mean", "= -(mean * mean", FORMULAS),
    "layer: diversity of padding": (
        LOSSES, r"softmax\(-1\) \* usable\.unsqueeze\(-1\)", "softmax(-1)", OPTIONS),
    "layer: orthogonal loss without the square": (
        LOSSES, r"gram\.square\(\)", "gram.abs()", OPTIONS_BESIDE),
    "layer: orthogonal loss of idle codewords": (
        LOSSES, r"unit \* active\.unsqueeze\(-1\)", "unit", FORMULAS),
    "layer: cross entropy is the mean square": (
        VQ, r"cross_entropy\(similarity, chosen\.indices\)", "chosen.commitment", OPTIONS_BESIDE),
    "layer: the synchronous update pulls back": (
        VQ, r"quantized \+ self\.sync_update_v", "quantized - self.sync_update_v", OPTIONS_BESIDE),
    "layer: the in-place step goes uphill": (
        VQ, r"chosen\.codebook_loss\.backward\(\)", "(-chosen.codebook_loss).backward()", FORMULAS),
    "layer: the bridge is not crossed": (
        "vqkernels/layers/codebook.py", r"self\.vq_bridge\(embed\)\.to", "embed.to", FORMULAS),
    "layer: learnable codewords leave the sphere": (
        "vqkernels/layers/codebook.py", r"return normalize\(embed\) if", "return embed if", FORMULAS),
    "layer: the affine EMA forgets the map": (
        "vqkernels/layers/affine.py", r"return \(z - batch_mean\) / scale \+ mean", "return z", OPTIONS_BESIDE),
    "layer: padding shifts the affine map": (
        "vqkernels/layers/affine.py", r"isfinite\(\)\.all\(-1\) & mask", "isfinite().all(-1)", OPTIONS),
    "SimVQ: rotation becomes straight-through": (
        "vqkernels/layers/sim_vq.py", r'"rotation" if self\.rotation_trick', '"ste" if self.rotation_trick', SIMVQ),
    "SimVQ: no gradient to the transform": (
        "vqkernels/layers/sim_vq.py", r"self\.codebook\.to\(z\.dtype\)", "self.codebook.detach()", SIMVQ),
    "SimVQ: input and codeword weigh the same in the loss": (
        "vqkernels/layers/sim_vq.py", r"self\.estimator, self\.input_to_quantize_commit_loss_weight", "self.estimator, 1.0", SIMVQ),
    "SimVQ: weight of the loss is ignored": (
        "vqkernels/layers/sim_vq.py", r"out\.commitment_loss\) \* self\.commitment_weight", "out.commitment_loss)", SIMVQ),
    "SimVQ: codes follow autocast": (
        "vqkernels/layers/sim_vq.py", r"device\.type, enabled=False", "device.type, torch.bfloat16, torch.is_autocast_enabled('cpu')", SIMVQ),
    "ResidualSimVQ: one estimator for the sum of the levels": (
        "vqkernels/layers/residual_sim_vq.py", r"per_level=True", "per_level=False", SIMVQ),
    "dropout: levels are not rounded up to a multiple": (
        "vqkernels/layers/dropout.py", r"-\(-\(last \+ 1\) // multiple_of\) \* multiple_of", "last + 1", FSQ),
    "FSQ: no gradient through the rounding": (
        "vqkernels/layers/tokens.py", r"return grad, None", "return 0 * grad, None", FSQ),
    "FSQ: symmetric codes lose their scale": (
        "vqkernels/layers/fsq.py", r"\* \(2\.0 / steps\)", "* (2.0 / (steps + 1))", FSQ),
    "FSQ: clamped codes lose their scale": (
        "vqkernels/layers/fsq.py", r"straight_through\(bounded, rounded\) / width", "straight_through(bounded, rounded)", FSQ),
    "FSQ: indices in half precision": (
        "vqkernels/layers/fsq.py", r"zhat = at_least_float32\(zhat\)", "zhat = zhat.bfloat16()", FSQ),
    "FSQ: codes are not rotated back": (
        "vqkernels/layers/fsq.py", r"rotation\.T if back else rotation", "rotation", FSQ),
    "FSQ: noise on half of the values": (
        "vqkernels/layers/fsq.py", r"bernoulli_\(self\.noise_dropout\)", "bernoulli_()", FSQ),
    "ResidualFSQ: levels do not refine": (
        "vqkernels/layers/residual_fsq.py", r"levels\*\*-level", "levels**0", FSQ),
    "ResidualFSQ: residual keeps its gradient": (
        "vqkernels/layers/residual_fsq.py", r"residual - code\.detach\(\)", "residual - code", FSQ),
    "LatentQuantize: the two losses are exchanged": (
        "vqkernels/layers/latent_quantization.py", r"self\.commitment_loss_weight \* self", "self.quantization_loss_weight * self", LATENT),
    "LatentQuantize: values move away from the features": (
        "vqkernels/layers/latent_quantization.py", r"parameter\.grad = grad", "parameter.grad = -grad", LATENT),
    "LatentQuantize: NaN counts in the loss": (
        "vqkernels/layers/latent_quantization.py", r"torch\.where\(usable\.unsqueeze\(-1\), t, 0\.0\)", "t", LATENT),
    "FSP: noise twice as wide as a level": (
        "vqkernels/layers/finite_scalar_perturbation.py", r"/ \(2 \* self\._levels\)", "/ self._levels", LATENT),
    "FSP: variance is biased": (
        "vqkernels/layers/finite_scalar_perturbation.py", r"\(count - 1\)\.clamp", "count.clamp", "tests/test_layers_latent_differential.py"),
    "LFQ: no gradient through the sign": (
        "vqkernels/layers/lfq.py", r"\(passed - passed\.detach\(\)\)", "0 * passed", LFQ),
    "LFQ: the batch's entropy is to be small": (
        "vqkernels/layers/lfq.py", r"per_sample - self\.diversity_gamma", "per_sample + self.diversity_gamma", LFQ_BESIDE),
    "LFQ: half the temperature": (
        "vqkernels/layers/lfq.py", r"\(4\.0 \* self\._unit", "(2.0 * self._unit", LFQ_BESIDE),
    "LFQ: commitment to the codes as they are after the loss": (
        "vqkernels/layers/lfq.py", r"\(z - codes\)\.nan", "(z - z.detach()).nan", LFQ_BESIDE),
    "LFQ: rare codes without the clamp": (
        "vqkernels/layers/bit_entropy.py", r"_excess\(log_high, log_low\)\)", "0 * _excess(log_high, log_low))", LFQ),
    "LFQ: no gradient at features that are 0": (
        "vqkernels/layers/bit_entropy.py", r"\[one - logits, one\]", "[-logits.relu(), -(-logits).relu()]", LFQ),
    "LFQ: bits in reverse order": (
        "vqkernels/layers/bit_entropy.py", r"arange\(bits - 1, -1, -1,", "arange(bits,", LFQ),
    "LFQ: masked tokens count": (
        "vqkernels/layers/lfq.py", r"valid & mask", "valid", LFQ),
    "LFQ: a NaN reaches the loss": (
        "vqkernels/layers/lfq.py", r"z\.transpose\(0, 1\)\)\.nan_to_num\(0\.0\)", "z.transpose(0, 1))", LFQ),
    "LFQ: a NaN gets a code": (
        "vqkernels/layers/lfq.py", r"gt_\(0\) \+ hole", "gt_(0)", LFQ),
    "LFQ: spherical codes are too long": (
        "vqkernels/layers/lfq.py", r"self\.codebook_scale / math\.sqrt\(self\.codebook_dim\)", "self.codebook_scale", LFQ),
    "LFQ: a share of all tokens, valid or not": (
        "vqkernels/layers/lfq.py", r"torch\.where\(valid, order, order \+ total\)", "order", LFQ),
    "ResidualLFQ: codes do not shrink": (
        "vqkernels/layers/residual_lfq.py", r"codebook_scale=2\.0\*\*-level", "codebook_scale=1.0", LFQ_BESIDE),
    "ResidualLFQ: residual keeps its gradient": (
        "vqkernels/layers/residual_lfq.py", r"residual - code\.detach\(\)", "residual - code", LFQ_BESIDE),
    "RandomProjectionQuantizer: input is not standardised": (
        "vqkernels/layers/random_projection_quantizer.py", r"self\.norm\(features", "(features", LFQ_RELATIVES),
    "BinaryMapper: gradient of the logits, not of the probabilities": (
        "vqkernels/layers/binary_mapper.py", r"to_one \* \(-logits\)\.sigmoid\(\)", "to_one", LFQ_RELATIVES),
    "BinaryMapper: loss has no threshold": (
        "vqkernels/layers/binary_mapper.py", r"\(divergence - self\.kl_loss_threshold\)", "divergence", LFQ_BESIDE),
    "EvoLFQ: the best is taken from the next generation": (
        "vqkernels/layers/evo_lfq.py", r"parents\[fittest\]", "pop_bits[fittest]", LFQ_RELATIVES),
    "beam: keeps the worst": (
        "vqkernels/layers/beam_search.py", r"= least\(score, kept\)", "= least(-score, kept)", RESIDUAL),
    "beam: forgets the score of its prefix": (
        "vqkernels/layers/beam_search.py", r"score\.repeat_interleave\(tried, 1\) \+ ", "", RESIDUAL),
    "beam: no weights": (
        "vqkernels/layers/beam_search.py", r"weights\[level\] \* error", "error", RESIDUAL),
    "beam: children of the wrong parent": (
        "vqkernels/layers/beam_search.py", r"_rows\(codes, parent\)", "_rows(codes, 0 * parent)", RESIDUAL),
    "beam: straight-through instead of rotation": (
        RVQ, r"layer\.choose\.pass_gradient\(vector, code, routed\)", "vector + (code - vector).detach()", RESIDUAL_BESIDE),
    "beam: no EMA step": (
        RVQ, r"            if updating:\n                layer\._codebook\.update\(vector", "            if False:\n                layer._codebook.update(vector", RESIDUAL),
    "beam: evaluation reports no errors": (
        RVQ, r"if beam > 1 and not self\.training:", "if False:", RESIDUAL_BESIDE),
    "implicit: condition is left out": (
        "vqkernels/layers/implicit_codebook.py", r"F\.linear\(condition\.to\(weight\.dtype\), for_condition\)", "0 * F.linear(condition.to(weight.dtype), for_condition)", RESIDUAL),
    "implicit: search by the stored codewords": (
        RVQ, r"            if mlp is None:\n                index = choose", "            if True:\n                index = choose", RESIDUAL),
    "implicit: condition has no gradient": (
        RVQ, r"code = mlp\.chosen\(codebook, index, total\)", "code = mlp.chosen(codebook, index, total if isinstance(total, float) else total.detach())", RESIDUAL),
    "residual: gradient passes between levels": (
        RVQ, r"if share > 0\.0 else code\.detach\(\)", "if share > 0.0 else code", RESIDUAL_BESIDE),
    "residual: no share of the gradient passes": (
        RVQ, r"share \* code \+ \(1\.0 - share\) \* code\.detach\(\)", "code.detach()", RESIDUAL_BESIDE),
    "residual: cross entropy after the nearest codewords": (
        RVQ, r"code = self\._lookup\(level, book\[0\], target, total\)", "code = self._lookup(level, book[0], logits[0].argmax(-1), total)", RESIDUAL),
    "residual: shared in-place optimizer never steps": (
        RVQ, r"        self\.layers\[0\]\.update_in_place_optimizer\(\)\n", "", RESIDUAL),
    "DiVeQ: noise in evaluation": (
        RVQ, r"if self\.diveq and self\.training:", "if self.diveq:", RESIDUAL),
    "DiVeQ: codewords get no gradient": (
        RVQ, r"torch\.where\(usable, quantized, 0\.0\)", "torch.where(usable, quantized, 0.0).detach()", RESIDUAL),
    "grouped: every group keeps its own levels": (
        "vqkernels/layers/grouped_residual_vq.py", r"seed = common_seed\(x\.device\)", "pass", GROUPED),
    "grouped: maps are split along their width": (
        "vqkernels/layers/grouped_residual_vq.py", r"x\.chunk\(self\.groups, split\)", "x.chunk(self.groups, -1)", GROUPED),
    "hierarchical: padding counts in averages": (
        "vqkernels/layers/hierarchical_vq.py", r" / share\.clamp\(min=1e-6\)", "", GROUPED),
    "hierarchical: dropped levels add to the result": (
        "vqkernels/layers/hierarchical_vq.py", r"results\[kept - 1\]", "results[-1]", GROUPED),
    "hierarchical: dropped levels add to the loss": (
        "vqkernels/layers/hierarchical_vq.py", r" \* \(torch\.arange\(self\.num_levels, device=x\.device\) < kept\)", "", GROUPED),
    "hierarchical: convolutions out of order": (
        "vqkernels/layers/hierarchical_vq.py", r"round\(position \*", "round((1 - position) *", GROUPED),
    "hierarchical: a NaN in the padding counts": (
        "vqkernels/layers/hierarchical_vq.py", r"torch\.where\(mask, t, 0\.0\)", "t * mask", GROUPED),
    "processes: sums are not shared": (
        "vqkernels/layers/codebook.py", r"dist\.all_reduce\(sums\)", "pass", PROCESSES),
    "processes: rows are not joined in deterministic mode": (
        "vqkernels/layers/codebook.py", r"return self\._world\(\) > 1 and torch\.are_det\w+\(\)", "return False", PROCESSES),
    "processes: each revives by its own draw": (
        "vqkernels/layers/codebook.py", r"            _from_first\(place\)\n", "", PROCESSES),
    "processes: one without rows leaves early": (
        "vqkernels/layers/codebook.py", r"if not self\.threshold_ema_dead_code or not self\.training:", "if not self.threshold_ema_dead_code or not self.training or z.shape[1] == 0:", PROCESSES),
    "engine: the compiler may undo the copy of the codebook": (
        "vqkernels/layers/codebook.py", r"_opaque_copy\(t\) if torch\.compiler\.is_compiling\(\) else t\.clone\(\)", "t.clone()", "tests/test_layers_engine.py"),
    "vmap: the rows of different elements change places": (
        MAPPED, r"t\.unflatten\(1, \(self\.size, rows\)\)\.transpose\(0, 1\)", "t.unflatten(1, (rows, self.size)).movedim(2, 0)", VMAP),
    "vmap: the losses of all elements have one scale": (
        MAPPED, r"scale\[:, level, None, None, None\]", "scale[:1, level, None, None, None]", VMAP),
    "vmap: one mean of the losses for all elements": (
        MAPPED, r"count = valid\.sum\(\(1, 2\)\)", "count = valid.sum((1, 2)).clamp(max=1)", VMAP),
    "vmap: the layer keeps indices of the inside": (
        "vqkernels/layers/usage.py", r" and \(indices is None or not transformed\(indices\)\)", "", VMAP),
    "projection: a NaN row reaches the weights": (
        "vqkernels/layers/tokens.py", r"torch\.where\(lost, 0\.0, x\.detach\(\)\)", "x.detach()", "tests/test_layers_hostile_rows.py"),
    "projection: infinity gets a code": (
        "vqkernels/layers/tokens.py", r"\(x @ x\.new_full\(x\.shape\[-1:\], _TINY\)\) \* 0\.0", "x.sum(-1).nan_to_num() * 0.0", "tests/test_layers_hostile_rows.py"),
    "dropout: of scalars also without gradients": (
        "vqkernels/layers/residual_fsq.py", r"quantize_dropout_without_gradients = False", "quantize_dropout_without_gradients = True", FSQ),
    "migration: weight norms are not folded": (
        "vqkernels/layers/migration.py", r"torch\._weight_norm\(", "(lambda direction, *_: direction)(", "tests/test_migration.py"),
    "migration: the optimizer's state is shared": (
        "vqkernels/layers/migration.py", r"state = copy\.deepcopy\(", "state = dict(", "tests/test_migration.py"),
    "migration: DAC without the share of samples left out": (
        "vqkernels/layers/factorized_residual_vq.py", r"loss \* mask\.to\(loss\.dtype\)\.mean\(\)", "loss", "tests/test_migration.py"),
    "tuning: the chip's table goes before the user's": (
        "triton_kernels/tuning.py", r"tables = \[measured, chip, \*tables\]", "tables = [chip, measured, *tables]", TUNING),
    "tuning: another card's measurements are taken": (
        "triton_kernels/tuning.py", r"load\(\)\.get\(card\(device\), \{\}\)", "next(iter(load().values()), {})", TUNING),
    "tune: a config that answers otherwise may win": (
        "vqkernels/cli/tune.py", r"if _same\(spec, got, want\):", "if True:", TUNING),
    "report: spills pass": (
        "triton_kernels/report.py", r"if code\.spills:", "if False:", REPORT),
    "report: fences pass": (
        "triton_kernels/report.py", r"if code\.fences:", "if False:", REPORT),
    "report: a matrix instruction anywhere will do": (
        "triton_kernels/report.py", r"re\.match\(TENSOR\[row\.target\], r\.code\.tensor\)", "True", REPORT),
    "report: warps take registers one by one": (
        "triton_kernels/chips.py", r"_up\(max\(registers, 1\) \* 32, 256\)", "(max(registers, 1) * 32)", REPORT),
    "triton: a piece of sums loses its last row": (
        "triton_kernels/codeword_sums.py", r"tl\.minimum\(begin \+ PIECE, last\)", "tl.minimum(begin + PIECE, last) - 1", SMALL + "test_sums_are_added_in_the_documented_order"),
    "triton: full and last pieces share a slot": (
        "triton_kernels/codeword_sums.py", r"slot = 2 \* \(begin // PIECE\) \+ \(end == last\)\.to\(tl\.int64\)", "slot = 2 * (begin // PIECE)", SMALL + "test_sums_are_added_in_the_documented_order"),
    "triton: the block's first code is counted twice": (
        "triton_kernels/codebook_usage.py", r"mask=valid & \(k != leader\)", "mask=valid", SMALL + "test_counts_with_and_without_histogram"),
    "triton: thresholds are rounded to nearest": (
        "triton_kernels/fsq.py", r"else _rounded_up\(exact\)", "else exact", SMALL + "test_levels_are_exact_at_every_threshold"),
    "triton: the slope of fsq is 1 - tanh squared": (
        "triton_kernels/fsq.py", r"sech \* sech", "(1.0 - ((1.0 - h * h) / (1.0 + h * h)) * ((1.0 - h * h) / (1.0 + h * h)))", SMALL + "test_gradient_keeps_its_digits_where_tanh_saturates"),
    "triton: the exponential loses a term": (
        "triton_kernels/exponential.py", r"1\.38888892e-03", "0.0", SMALL + "test_exponential_to_two_units_in_the_last_place"),
    "triton: NaN beams come last": (
        "triton_kernels/trie_topk.py", r"0x7FC00000\)", "-0x7FFFFFFF)", SMALL + "test_logits_that_are_not_finite"),
    "triton: the second beam is not merged": (
        "triton_kernels/trie_topk.py", r"range\(1, W\)", "range(2, W)", SMALL + "test_more_children_than_are_kept_at_once"),
    "triton: a dead state is read": (
        "triton_kernels/trie_topk.py", r"\(state >= 0\) & \(state < S\)", "(state >= 0)", SMALL + "test_a_trie_that_does_not_fit_is_never_read_outside"),
    "triton: rounding is not in the bound": (
        "triton_kernels/search.py", r"lost \+= tl\.sum\(e \* e, 1\)", "lost += 0.0 * tl.sum(e * e, 1)", CERTIFIED),
    "triton: tensor cores add without error": (
        "triton_kernels/search.py", r"units = 4\.0 \* D \+ 88\.0", "units = 0.0625 * D", CERTIFIED),
    "triton: a lane's second lowest score is lost": (
        "triton_kernels/nearest_codeword.py", r"second = tl\.minimum\(second, tl\.maximum\(best, scores\)\)", "second = second", CERTIFIED),
    "triton: a split's second lowest score is lost": (
        "triton_kernels/nearest_codeword.py", r"second = tl\.minimum\(second, tl\.maximum\(best, value\)\)", "second = second", CERTIFIED),
    "triton: a program compares the rows of one step only": (
        "triton_kernels/nearest_codeword.py", r"range\(tl\.program_id\(0\), \(count \+ ROWS - 1\) // ROWS,", "range(tl.program_id(0), tl.program_id(0) + 1,", CERTIFIED),
    "triton: ties go to the last codeword": (
        "triton_kernels/nearest_codeword.py", r"tl\.where\(value < best, t \* CODES \+ lane, index\)", "tl.where(value <= best, t * CODES + lane, index)", CERTIFIED),
    "triton: rows land one slot further in the list": (
        "triton_kernels/nearest_codeword.py", r"tl\.cumsum\(listing, 0\) - 1", "tl.cumsum(listing, 0)", CERTIFIED),
    "triton: the canonical square is multiplied out": (
        "triton_kernels/search.py", r"total \+= \(a - b\) \* \(a - b\)", "total += a * a - 2.0 * a * b + b * b", CERTIFIED),
    "triton: CPU tensors lose digits in torch's products": (
        "triton_kernels/nearest_codeword.py", r"if z\.is_cpu:", "if False:", CERTIFIED),
    "triton: every row is compared": (
        "triton_kernels/nearest_codeword.py", r"\(gap > margin\)", "(gap > margin + 1e30)", CERTIFIED),
    "triton: CPU tensors reach the GPU's kernels": (
        "vqkernels/dispatch.py", r"if kind not in runs_on:", "if False:", "tests/test_triton_dispatch.py::test_cpu_tensors_are_refused_on_a_machine_with_a_gpu"),
    "verify: a wrong contender is timed": (
        "vqkernels/bench/gpu.py", r"result\.error = _disagreement\(answer, ours\)", "_disagreement(answer, ours)", "tests/test_verify.py"),
    "verify: what was not run is not said": (
        "vqkernels/verify.py", r"if available is not True:\n                out", "if False:\n                out", "tests/test_verify.py"),
    "triton: canonical distances are fused": (
        "triton_kernels/nearest_codeword.py", r"enable_fp_fusion=False", "enable_fp_fusion=True", "tests/test_ptx_checks.py"),
    "triton: survivors are not compared": (
        RESIDUALS, r"\(best - lowest\[:, None\] <= margin\[:, None\]\)", "(best - lowest[:, None] <= 0.0)", ON_RESIDUALS),
    "triton: a lane's second survivor is forgotten": (
        RESIDUALS, r"\(behind - lowest <= margin\)", "(behind < lowest)", ON_RESIDUALS),
    "triton: two survivors pass for one": (
        RESIDUALS, r"unsure = hidden \| .*", "unsure = hidden", ON_RESIDUALS),
    "triton: the last residual may overflow": (
        RESIDUALS, r"alive = alive & \(largest_magnitude\(residual, rows, alive, D, BLOCK\) >= 0\)\n    tl", "tl", ON_RESIDUALS),
    "triton: a level does not wait for the one before": (
        RESIDUALS, r"tl\.debug_barrier\(\)  # what the rows'", "pass  # what the rows'", ON_RESIDUALS),
    "triton: squares of float64 may vanish": (
        RESIDUALS, r"outer <= _SAFE_EXPONENT", "outer <= 2000", ON_RESIDUALS),
    "triton: losses are divided by all programs": (
        RESIDUALS, r"tl\.maximum\(rows, 1\) \* D", "PROGRAMS * D", ON_RESIDUALS),
    "triton: an index outside its codebook goes unseen": (
        RESIDUALS, r'tl\.where\(known\[:, None\], result, float\("nan"\)\)', "result", ON_RESIDUALS),
    "triton: every level's Jacobian is that of z": (
        RESIDUALS, r"five_dots\(residual, c, g\)", "five_dots(first, c, g)", ON_RESIDUALS),
    "triton: long rows of the rotation lose their first step": (
        "triton_kernels/rotation_trick.py", r"zz, qq, zq, zg, qg = zz \+ zz1, qq \+ qq1", "zz, qq, zq, zg, qg = zz1, qq + qq1", ON_RESIDUALS),
    "images: a resumed run has a new optimizer": (
        TRAIN, r'restore_optimizer\(self\.optimizer, tensors\["optimizer"\]\)', "pass", KILLED),
    "images: a resumed run averages anew": (
        TRAIN, r'self\.average\.load\(tensors\["average"\]\)', "pass", KILLED),
    "images: a resumed run draws anew": (
        TRAIN, r'self\._set_random\(tensors\["random"\]\)', "pass", KILLED),
    "images: a resumed run repeats records": (
        TRAIN, r'if record\["step"\] <= self\.step\]', "]", KILLED),
    "images: a resumed run begins its epoch anew": (
        TRAIN, r"\[first % each :\]", "[:]", KILLED),
    "images: an evaluation moves the trained model": (
        TRAIN, r"copy\.deepcopy\(self\.task\.model\)", "self.task.model", KILLED),
    "images: processes do not find each other": (
        TRAIN, r"cpu=not torch\.accelerator\.is_available\(\),", "", f"{ON_TRAIN}::test_two_processes_train_as_one_with_the_joined_batch"),
    "images: the last weights are kept, not the best": (
        TRAIN, r"if \(best or not settings\.patience\)", "if (True)", f"{ON_TRAIN}::test_early_stopping_keeps_the_best"),
    "images: the adversarial loss teaches the discriminator": (
        GAN, r"fixed = \{name: value\.detach\(\)", "fixed = {name: value", ON_MODELS),
    "images: the discriminator's loss teaches the decoder": (
        GAN, r"out\.reconstruction\.detach\(\)\)", "out.reconstruction)", ON_MODELS),
    "images: the adaptive weight is upside down": (
        GAN, r"theirs / \(its \+ 1e-4\)", "its / (theirs + 1e-4)", ON_MODELS),
    "images: levels share one embedding": (
        PRIOR, r"% self\.levels \* self\.codebook_size", "% self.levels * 0", ON_MODELS),
    "images: the cache of earlier codes is not used": (
        PRIOR, r"self\.gpt\(None, cache,", "self.gpt(None, None,", ON_MODELS),
    "images: tiles see too little of their neighbours": (
        "vqkernels/images/pictures.py", r"HALO = 8 ", "HALO = 2 ", "tests/test_images_cli.py::test_tiles_show_no_seam"),
}  # fmt: skip


def build(tree: Path) -> None:
    environment = {**os.environ, "VQK_CUDA": "0"}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(f"mutations: the copy does not build:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def first_failure(tree: Path, tests: str) -> str | None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", tests]
    out = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if out.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", out.stdout, flags=re.M)
    return found[1] if found else f"pytest exit code {out.returncode}: {out.stdout[-300:]}{out.stderr[-300:]}"


def main() -> int:
    words = sys.argv[1:]
    chosen = {
        k: v
        for k, v in (
            MUTATIONS | search_mutations.MUTATIONS | trie_mutations.MUTATIONS | recommend_mutations.MUTATIONS
        ).items()
        if not words or any(w in k for w in words)
    }
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "vqkernels"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "out", "__pycache__", ".*_cache")
        )
        # the editable install of the original serves vqkernels.triton_kernels; the copy brings its own
        (tree / "vqkernels" / "triton_kernels").symlink_to("../triton_kernels")
        if any(v[0].startswith("csrc") for v in chosen.values()):
            build(tree)
        for name, (file, pattern, replacement, tests) in chosen.items():
            path = tree / file
            source = path.read_text()
            mutant, n = re.subn(pattern, lambda _, r=replacement: r, source, count=1)
            if n != 1:
                sys.exit(f"mutations: {name!r} no longer finds its place in {file}; update tests/mutations.py")
            path.write_text(mutant)
            if compiled := file.startswith("csrc"):
                build(tree)
            caught = first_failure(tree, tests)
            path.write_text(source)
            if compiled:
                build(tree)
            print(f"{'caught  ' if caught else 'SURVIVED'}  {name}: {caught or tests}", flush=True)
            if not caught:
                survivors.append(name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
