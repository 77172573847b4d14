"""Mutations of tokenizers, of item embeddings, and of how TIGER is trained and compared; tests/mutations.py makes them."""

TRAINING, COMPARE = "vqkernels/recommend/training.py", "vqkernels/recommend/compare.py"
COLLABORATIVE, RESAMPLER, TEXT = (
    "vqkernels/recommend/collaborative.py",
    "vqkernels/models/resampler.py",
    "vqkernels/data/text.py",
)
ON_COLLABORATIVE, ON_MODELS, ON_IDS = (f"tests/test_{name}.py" for name in ("collaborative", "models", "semantic_ids"))
ON_TRAINING, ON_COMPARE = "tests/test_recommend_training.py", "tests/test_cli_pipeline.py"
DECODER, ON_DECODER = "vqkernels/recommend/decoder.py", "tests/test_recommend.py"

MUTATIONS = {
    "decoder: beams keep their places": (
        DECODER, r"chosen = parents\[", "chosen = (0 * parents)[", ON_DECODER),
    "decoder: a beam forgets its codes": (
        DECODER, r"        if before:", "        if False:", ON_DECODER),
    "decoder: padding is read": (
        DECODER, r"self\.padding\)\.softmax", "0.0).softmax", ON_DECODER),
    "decoder: a step stands where the last one stood": (
        DECODER, r"        self\.done \+= 1\n", "", ON_DECODER),
    "decoder: the first tokens see the later ones": (
        DECODER, r" \+ future\n", "\n", ON_DECODER),
    "decoder: places of a beam's own codes are not told": (
        DECODER, r" \+ self\.bias\[\.\.\., at, None, start : at \+ 1\]", "", ON_DECODER),
    "decoder: a beam's own codes have no weight": (
        DECODER, r" @ values \+ mine\)", " @ values)", ON_DECODER),
    "decoder: the next block has the first one's codes": (
        DECODER, r"before\[place\]", "before[0]", ON_DECODER),
    "decoder: keys and values change places": (
        DECODER, r"\(own\[0\] @ query", "(own[1] @ query", ON_DECODER),
    "decoder: the last block asks in place of the first": (
        DECODER, r"if block is decoder\.block\[-1\]:", "if block is decoder.block[0]:", ON_DECODER),
    "training: a resumed generator starts anew": (
        TRAINING, r"torch\.set_rng_state\(tensors\[\"random\"\]\[\"cpu\"\]\[rank\]\)", "pass", ON_TRAINING),
    "training: the optimizer forgets": (
        TRAINING, r"restore_optimizer\(self\.optimizer, tensors\[\"optimizer\"\]\)", "pass", ON_TRAINING),
    "training: an epoch is begun again": (
        TRAINING, r"for step in range\(self\.step, len\(found\)\)", "for step in range(len(found))", ON_TRAINING),
    "training: the best weights are forgotten": (
        TRAINING, r"self\.best_state = tensors\.get\(\"best\"\)", "pass", ON_TRAINING),
    "training: the last weights are kept": (
        TRAINING, r"model\.load_state_dict\(self\.best_state, strict=False\)", "pass", ON_TRAINING),
    "training: best weights change with the model": (
        TRAINING, r"name: value\.clone\(\) for", "name: value for", ON_TRAINING),
    "training: patience counts all epochs": (
        TRAINING, r"self\.best, self\.waited = record\[\"validation_ndcg\"\], 0", "self.best = record['validation_ndcg']", ON_TRAINING),
    "training: other data are resumed": (
        TRAINING, r"digest\.hexdigest\(\)\[:16\]", "'data'", ON_TRAINING),
    "training: every process has the same examples": (
        TRAINING, r"examples\(rows\[part::parts\]\)", "examples(rows[0::parts])", ON_TRAINING),
    "training: parts count alike whatever their size": (
        TRAINING, r"if world > 1:  # every", "if False:  # every", ON_TRAINING),
    "training: a last batch may have no example for a process": (
        TRAINING, r"np\.resize\(rows, max\(len\(rows\), parts\)\)", "rows", ON_TRAINING),
    "training: validation is one process's share": (
        TRAINING, r"self\.accelerator\.reduce\(total, \"sum\"\)", "total", ON_TRAINING),
    "training: no warm-up": (
        TRAINING, r"return done / warmup", "return 1.0", ON_TRAINING),
    "training: the rate does not fall": (
        TRAINING, r"group\[\"lr\"\] = s\[\"lr\"\] \* rate", 'group["lr"] = s["lr"]', ON_TRAINING),
    "training: the latest window begins too early": (
        TRAINING, r"phase = -lengths % window if last", "phase = 0 * lengths if last", ON_TRAINING),
    "training: forward stays wrapped": (
        TRAINING, r"accelerator\.unwrap_model\(wrapped, keep_fp32_wrapper=False\)", "pass", ON_TRAINING),
    "compare: a training is begun again": (
        COMPARE, r"resume=True,", "resume=False,", ON_COMPARE),
    "compare: every run has the first seed": (
        COMPARE, r"\*\*s\.tiger\(\), seed=seed\)", "**s.tiger(), seed=s.seed)", ON_COMPARE),
    "compare: the spread of a population": (
        COMPARE, r"statistics\.stdev\(v\)", "statistics.pstdev(v)", ON_COMPARE),
    "compare: all users are tested": (
        COMPARE, r"if count else split", "if False else split", ON_COMPARE),
    "collaborative: unknown piece is right": (
        COLLABORATIVE, r", pieces, -100\)", ", pieces, pieces)", ON_COLLABORATIVE),
    "collaborative: no graph": (
        COLLABORATIVE, r"0\.0 \* queries\.sum\(\)", "queries.new_zeros(())", ON_COLLABORATIVE),
    "collaborative: no contrastive loss": (
        COLLABORATIVE, r"if self\.weights\[0\] and len\(firsts\):", "if False:", ON_COLLABORATIVE),
    "collaborative: no caption loss": (
        COLLABORATIVE, r"if self\.weights\[1\]:", "if False:", ON_COLLABORATIVE),
    "collaborative: no mask of positives": (
        COLLABORATIVE, r"related & ~own", "torch.zeros_like(related)", ON_COLLABORATIVE),
    "collaborative: masks its own pair": (
        COLLABORATIVE, r"related & ~own", "related", ON_COLLABORATIVE),
    "collaborative: related only equal": (
        COLLABORATIVE, r"\(found \| \(a\[:, None\] == b\)\)", "(a[:, None] == b)", ON_COLLABORATIVE),
    "collaborative: related without equal": (
        COLLABORATIVE, r"\(found \| \(a\[:, None\] == b\)\)", "found", ON_COLLABORATIVE),
    "collaborative: one direction": (
        COLLABORATIVE, r"cross_entropy\(logits\.T, target\)", "cross_entropy(logits, target)", ON_COLLABORATIVE),
    "collaborative: no temperature": (
        COLLABORATIVE, r"\.T / self\.temperature", ".T", ON_COLLABORATIVE),
    "collaborative: partners uniform": (
        COLLABORATIVE, r"self\.until = np\.cumsum\(\[0, \*counts\]\)", "self.until = np.cumsum([0, *np.ones_like(counts)])", ON_COLLABORATIVE),
    "collaborative: partner off by one": (
        COLLABORATIVE, r'"right"\) - 1\]', '"left") - 1]', ON_COLLABORATIVE),
    "collaborative: near 2": (
        COLLABORATIVE, r"NEAR = 3", "NEAR = 2", ON_COLLABORATIVE),
    "collaborative: across users": (
        COLLABORATIVE, r"\(owner\[:-apart\] == owner\[apart:\]\) & ", "", ON_COLLABORATIVE),
    "collaborative: one way pairs": (
        COLLABORATIVE, r"keys \+= \[a\[near\] \* items \+ b\[near\], b\[near\] \* items \+ a\[near\]\]", "keys += [a[near] * items + b[near]]", ON_COLLABORATIVE),
    "collaborative: self pairs": (
        COLLABORATIVE, r" & \(a != b\)", " & (a != b - items)", ON_COLLABORATIVE),
    "collaborative: padding read": (
        RESAMPLER, r"memory_key_padding_mask=~mask", "memory_key_padding_mask=None", ON_COLLABORATIVE),
    "collaborative: queries tied": (
        RESAMPLER, r"self\.queries\.expand\(len\(states\), -1, -1\)", "self.queries[:1].expand(len(self.queries), -1).expand(len(states), -1, -1)", ON_COLLABORATIVE),
    "collaborative: decoder not causal": (
        RESAMPLER, r"x = block\(x, src_mask=later\)", "x = block(x)", ON_COLLABORATIVE),
    "collaborative: decoder deaf": (
        RESAMPLER, r"self\.prefix\(queries\)", "self.prefix(queries * 0)", ON_COLLABORATIVE),
    "collaborative: no places": (
        RESAMPLER, r"x = x \+ self\.places\.weight\[:length\]", "x = x + 0", ON_COLLABORATIVE),
    "collaborative: captions count padding": (
        RESAMPLER, r"\[mask\[:, 1:\]\]\) @", "[mask[:, 1:] | True]) @", ON_COLLABORATIVE),
    "collaborative: read order lost": (
        COLLABORATIVE, r"return read\[torch\.from_numpy\(np\.argsort\(np\.concatenate\(parts\)\)\)\.to\(self\.device\)\]", "return read", ON_COLLABORATIVE),
    "collaborative: caption mean per chunk": (
        COLLABORATIVE, r'reduction="sum"', 'reduction="mean"', ON_COLLABORATIVE),
    "collaborative: not unit": (
        COLLABORATIVE, r"return nn\.functional\.normalize\(self\.head\(queries\.flatten\(1\)\), dim=-1\)", "return self.head(queries.flatten(1))", ON_COLLABORATIVE),
    "collaborative: seed ignored in init": (
        COLLABORATIVE, 'torch\\.manual_seed\\(self\\.seed\\)\n            self\\.net', 'torch.manual_seed(0)\n            self.net', ON_COLLABORATIVE),
    "collaborative: seed ignored in batches": (
        COLLABORATIVE, r"np\.random\.default_rng\(self\.seed\)", "np.random.default_rng()", ON_COLLABORATIVE),
    "collaborative: rng leaks": (
        COLLABORATIVE, r"with torch\.random\.fork_rng\(\), progress_bar", "with progress_bar", ON_COLLABORATIVE),
    "collaborative: dropout in encode": (
        COLLABORATIVE, '        self\\.net\\.eval\\(\\)\n        return self', "        return self", ON_COLLABORATIVE),
    "collaborative: sha unchecked": (
        COLLABORATIVE, r'!= config\["sha256"\]', "== 0", ON_COLLABORATIVE),
    "collaborative: eval lost on load": (
        COLLABORATIVE, r"encoder\._config\)\.eval\(\)", "encoder._config)", ON_COLLABORATIVE),
    "collaborative: lr never rises": (
        COLLABORATIVE, r"min\(done / warmup, fall\)", "0 * fall", ON_COLLABORATIVE),
    "collaborative: only first query embeds": (
        COLLABORATIVE, r"self\.head\(queries\.flatten\(1\)\)", "self.head(queries[:, :1].expand_as(queries).flatten(1))", ON_COLLABORATIVE),
    "collaborative: cut at 256": (
        TEXT, r"_minilm\(texts, STATE_TOKENS, progress\)", "_minilm(texts, MINILM_TOKENS, progress)", ON_COLLABORATIVE),
    "collaborative: states keep padding": (
        TEXT, r"real = mask\[place\]\.bool\(\)", "real = mask[place] > -1", ON_COLLABORATIVE),
    "collaborative: states in batch order": (
        TEXT, r"pieces\[row\], states\[row\] =", "pieces[len(texts) - 1 - row], states[len(texts) - 1 - row] =", ON_COLLABORATIVE),
    "collaborative: no cache": (
        TEXT, r"if key not in _latest:", "if True:", ON_COLLABORATIVE),
    "collaborative: missing unchecked": (
        TEXT, r"if missing := _missing\(\):", "if None and (missing := 1):", ON_COLLABORATIVE),
    "collaborative: captions of the next text as own": (
        COLLABORATIVE, r"enumerate\(\(rows, \(rows \+ 1\) % items\)\)", "enumerate(((rows + 1) % items, rows))", ON_COLLABORATIVE),
    "collaborative: unpaired not counted": (
        COLLABORATIVE, r"\(pairs\.degree == 0\)", "(pairs.degree > 0)", ON_COLLABORATIVE),
    "tokenizer: units that are left listen at first": (
        "vqkernels/models/rqvae.py", '        layers\\[-1\\]\\.weight\\[:n\\] = 0\\.0\n', "", ON_MODELS),
    "tokenizer: the decoder's mean is lost": (
        "vqkernels/models/rqvae.py", r"_carry\(decoder, identity, components\.T \* scale, mean\)", "_carry(decoder, identity, components.T * scale, 0 * mean)", ON_MODELS),
    "tokenizer: a narrow layer carries too much": (
        "vqkernels/models/rqvae.py", r"layer\.out_features // 2 for layer", "layer.out_features for layer", ON_MODELS),
    "tokenizer: equal items divide by zero": (
        "vqkernels/models/rqvae.py", r"        if scale > 0:", "        if True:", ON_MODELS),
    "tokenizer: the last components": (
        "vqkernels/models/rqvae.py", r"\.T\.flip\(0\)\[:count\]", ".T[:count]", ON_MODELS),
    "tokenizer: identity of the wrong shape": (
        "vqkernels/models/rqvae.py", r"identity\[:, :count\]", "identity.T", ON_MODELS),
    "tokenizer: sums of all items": (
        "vqkernels/semantic_ids/rqvae.py", '                layer\\._codebook\\.embed_avg \\*= share\n', "", ON_MODELS),
    "tokenizer: counts of all items": (
        "vqkernels/semantic_ids/rqvae.py", '                layer\\._codebook\\.cluster_size \\*= share\n', "", ON_MODELS),
    "tokenizer: a random start": (
        "vqkernels/semantic_ids/rqvae.py", r"self\._model\.init_pca_\(z\)\.quantizer", "self._model.quantizer", ON_MODELS),
    "tokenizer: squares in float32": (
        "vqkernels/semantic_ids/base.py", r"\(rows - mean\)\.double\(\)\.square_\(\)", "(rows - mean).square_().double()", ON_IDS),
    "tokenizer: the input is standardised in place": (
        "vqkernels/semantic_ids/base.py", r"return \(x - self\._mean\.to\(x\.device\)\)\.div_\(", "return x.sub_(self._mean.to(x.device)).div_(", ON_IDS),
    "tokenizer: only tiles are standardised": (
        "vqkernels/semantic_ids/base.py", r"map\(self\._standardise, x\.split\(CHUNK\)\)", "x.split(CHUNK)", ON_IDS),
    "tokenizer: residuals of one tile": (
        "vqkernels/semantic_ids/tokenizers.py", '                    rows -= km\\.centroids\\[own\\]\n', '                    rows -= km.centroids[own]\n                    break\n', ON_IDS),
    "tokenizer: levels turned round": (
        "vqkernels/semantic_ids/tokenizers.py", r"        return torch\.stack\(levels, 1\)", "        return torch.stack(levels[::-1], 1)", ON_IDS),
    "tokenizer: infinities are finite": (
        "vqkernels/ops/checks.py", r"    if x\.sum\(\)\.isfinite\(\):", "    if not x.sum().isnan():", ON_IDS),
    "tokenizer: digits by the first code": (
        "vqkernels/semantic_ids/collisions.py", r"np\.lexsort\(codes\.T\[::-1\]\)", "np.lexsort(codes.T[:1])", ON_IDS),
}  # fmt: skip
