"""Mutations of the trie and of what decodes over it; tests/mutations.py makes them."""

TRIE, PROCESSOR = "vqkernels/semantic_ids/trie.py", "vqkernels/semantic_ids/logits_processor.py"
BEAM, TIGER, STEP = "vqkernels/recommend/beam.py", "vqkernels/recommend/tiger.py", "csrc/cpu/trie_topk.cpp"
ON_TRIE, ON_PROCESSOR, ON_BEAM = (f"tests/test_{name}.py" for name in ("trie", "logits_processor", "recommend"))
DRIVER = "tests/test_cpp.py"

MUTATIONS = {
    "trie: a row with a NaN is passed over": (
        STEP, r"if \(finite && score", "if (score", DRIVER),
    "trie: NaN is no candidate": (
        STEP, r"if \(!\(total <= best\.bar\)\)", "if (total > best.bar)", DRIVER),
    "trie: the bar is the best, not the k-th": (
        STEP, r"bar = list_\[k_ - 1\]", "bar = list_[0]", DRIVER),
    "trie: ties go to the last edge": (
        STEP, r"a\.edge < b\.edge", "a.edge > b.edge", DRIVER),
    "trie: a masked token is a child of the reference": (
        "vqkernels/reference/trie_topk.py", r"valid &= \(token >= 0\) & \(token < V\)", "valid &= token < V", "tests/test_ops.py"),
    "trie: keys of several words out of order": (
        TRIE, r"found if order is None else order\[found\]", "found", ON_TRIE),
    "trie: first children one place off": (
        TRIE, r"edges \+ np\.flatnonzero\(before\[rows\]\)", "edges + np.flatnonzero(opens[rows])[: before.sum()]", ON_TRIE),
    "trie: a masked edge is walked": (
        TRIE, r"self\.edge_tokens\[edge\] == tokens", "self._codes[edge] == tokens", ON_TRIE),
    "trie: a token that is none follows a masked edge": (
        TRIE, r"found & \(tokens >= 0\)", "found", ON_TRIE),
    "trie: prefixes without items stay open": (
        TRIE, r"opened = running\[edges\[1:\]\] > running\[edges\[:-1\]\]", "opened = edges[1:] > edges[:-1]", ON_TRIE),
    "trie: a view of a view forgets the first": (
        TRIE, r"opened &= self\._allowed_before\.diff\(\) > 0", "pass", ON_TRIE),
    "trie: lists ignore what the view forbids": (
        TRIE, r"return self\._sizes\(leaves\) > 0", "return leaves >= 0", ON_TRIE),
    "trie: prefixes of denied items stay open": (
        TRIE, r"keys\[counts == self\._sizes\(keys % self\.num_nodes\)\]", "keys[keys % self.num_nodes >= self._first_leaf]", ON_TRIE),
    "trie: one seen item closes its prefix": (
        TRIE, r"keys\[counts == self\._sizes\(keys % self\.num_nodes\)\]", "keys", ON_TRIE),
    "trie: denied items are counted twice": (
        TRIE, r"lists = \[np\.unique\(rows\) for rows in lists\]", "lists = [np.repeat(rows, 2) for rows in lists]", ON_TRIE),
    "trie: appended items change old rows": (
        TRIE, r"\[self\.codes\(\)\.cpu\(\)\.numpy\(\), ids\]", "[ids, self.codes().cpu().numpy()]", ON_TRIE),
    "trie: a view is saved": (
        TRIE, r'"edge_tokens": self\._codes', '"edge_tokens": self.edge_tokens', ON_TRIE),
    "processor: the lists of another history": (
        PROCESSOR, r"row \* histories // rows", "row % histories", ON_PROCESSOR),
    "processor: roots of another history": (
        PROCESSOR, r"trie\.roots\.repeat_interleave\(rows // len\(trie\.roots\)\)", "trie.roots.repeat(rows // len(trie.roots))", ON_PROCESSOR),
    "processor: words are codes": (
        PROCESSOR, r"known\[token\.clamp\(max=len\(known\) - 1\)\], -1\)", "known[token.clamp(max=len(known) - 1)].clamp(min=0), -1)", ON_PROCESSOR),
    "processor: masked children are open": (
        PROCESSOR, r"open_ = code >= 0", "open_ = code >= -1", ON_PROCESSOR),
    "processor: the prompt is read": (
        PROCESSOR, r"input_ids\[:, self\.prompt_length :\]", "input_ids[:, max(0, self.prompt_length - 1) :]", ON_PROCESSOR),
    "beam: no spare candidates": (
        BEAM, r"keep = min\(beams \+ self\.spare\[self\.level\],", "keep = min(beams + 1,", ON_BEAM),
    "beam: denied nodes of the level before": (
        BEAM, r"closed\(self\.histories, states, self\.level\)", "closed(self.histories, states, max(0, self.level - 1))", ON_BEAM),
    "beam: free beams follow the first": (
        BEAM, r"self\.trie\.walk\(self\.states\.gather\(1, parents\), codes\)", "self.trie.walk(self.states[:, :1].expand_as(codes), codes)", ON_BEAM),
    "beam: seen items of an allow list come back": (
        BEAM, r"np\.setdiff1d\(a, d\)", "a", ON_BEAM),
    "tiger: lists of another batch": (
        TIGER, r"\[closed\[i\] for i in rows\]", "closed[: len(rows)]", ON_BEAM),
    "tiger: an allow list is not heard": (
        TIGER, r"trie, allow = trie\.allow\(allow\), None", "allow = None", ON_BEAM),
}  # fmt: skip
