"""Mutations of how TIGER is trained and compared; tests/mutations.py makes them."""

TRAINING, COMPARE = "vqkernels/recommend/training.py", "vqkernels/recommend/compare.py"
ON_TRAINING, ON_COMPARE = "tests/test_recommend_training.py", "tests/test_cli_pipeline.py"

MUTATIONS = {
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
}  # fmt: skip
