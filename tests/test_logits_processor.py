"""Constrained generate() of transformers models: against exhaustive scoring and against prefix_allowed_tokens_fn."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'vqkernels[models]'")

import transformers

from vqkernels.semantic_ids import Trie, TrieLogitsProcessor

LEVELS, SIZE, WORDS = 3, 6, 11
# codes of a level lie anywhere in the vocabulary, behind the words
TOKENS = torch.randperm(LEVELS * SIZE, generator=torch.Generator().manual_seed(0)).view(LEVELS, SIZE) + WORDS
VOCABULARY, EOS = WORDS + LEVELS * SIZE, 1


def some_ids():
    return np.unique(np.random.default_rng(0).integers(0, SIZE, (40, LEVELS)), axis=0)


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None, initializer_factor=4.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), 1


def decoder_only():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), 5


@pytest.fixture(scope="module", params=[encoder_decoder, decoder_only], ids=lambda f: f.__name__)
def setting(request):
    """(model, inputs of three histories, tokens before the first code)"""
    torch.manual_seed(0)
    model, prompt = request.param()
    return model.eval(), torch.randint(2, WORDS, (3, 5)), prompt


def generate(setting, processor=None, **options):
    model, inputs, _ = setting
    options = {"max_new_tokens": LEVELS, "do_sample": False, "attention_mask": torch.ones_like(inputs), **options}
    processors = [processor] if processor else None
    return model.generate(
        inputs, logits_processor=processors, return_dict_in_generate=True, output_scores=True, **options
    )


def items_of(setting, sequences, ids, tokens=TOKENS):
    """Rows of the items that were generated; -1 for anything else."""
    codes = [tuple(t.tolist()) for t in sequences[:, setting[2] : setting[2] + LEVELS]]
    rows = {tuple(tokens[range(LEVELS), code].tolist()): row for row, code in enumerate(ids)}
    return [rows.get(code, -1) for code in codes]


def exhaustive(setting, ids):
    """float [3, N]: log-probability of every item, by one forward pass each."""
    model, inputs, prompt = setting
    out = []
    for source in inputs:
        source = source.expand(len(ids), -1)
        codes = TOKENS[torch.arange(LEVELS), torch.from_numpy(ids)]
        with torch.no_grad():
            if prompt == 1:
                before = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), codes[:, :-1]], 1)
                logits = model(input_ids=source, decoder_input_ids=before).logits
            else:
                logits = model(input_ids=torch.cat([source, codes[:, :-1]], 1)).logits[:, prompt - 1 :]
        out.append(logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum((1, 2)))
    return torch.stack(out)


def test_many_beams_are_exhaustive_scoring(setting):
    ids = some_ids()
    processor = TrieLogitsProcessor(Trie(ids), TOKENS, setting[2])
    out = generate(setting, processor, num_beams=len(ids), num_return_sequences=len(ids), length_penalty=0.0)
    exact = exhaustive(setting, ids)
    assert items_of(setting, out.sequences, ids) == exact.argsort(1, descending=True).flatten().tolist()
    torch.testing.assert_close(
        out.sequences_scores, exact.sort(1, descending=True).values.flatten(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 4}])
def test_it_does_what_prefix_allowed_tokens_fn_does(setting, options):
    ids, prompt = some_ids(), setting[2]
    allowed: dict[tuple, set] = {}
    for code in TOKENS[torch.arange(LEVELS), torch.from_numpy(ids)].tolist():
        for n in range(LEVELS):
            allowed.setdefault(tuple(code[:n]), set()).add(code[n])
    theirs = generate(
        setting, prefix_allowed_tokens_fn=lambda _, sent: sorted(allowed[tuple(sent[prompt:].tolist())]), **options
    )
    ours = generate(setting, TrieLogitsProcessor(Trie(ids), TOKENS, prompt), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))
    assert -1 not in items_of(setting, ours.sequences, ids)
    assert -1 in items_of(setting, generate(setting, **options).sequences, ids)  # unconstrained it would be invalid


def test_lists_for_all_histories_and_for_each(setting):
    ids, beams = some_ids(), 4
    trie, exact, rng = Trie(ids), exhaustive(setting, ids), np.random.default_rng(1)
    stock = rng.random(len(ids)) < 0.5
    lists = [rng.permutation(len(ids))[:n] for n in (beams, 20, 10)]
    every = set(range(len(ids)))
    for view, wanted in (
        (trie.allow(stock), [set(np.flatnonzero(stock))] * 3),
        (trie.allow(lists), [set(rows) for rows in lists]),
        (trie.deny(lists), [every - set(rows) for rows in lists]),
        (trie.allow(stock).deny(lists), [set(np.flatnonzero(stock)) - set(rows) for rows in lists]),
    ):
        processor = TrieLogitsProcessor(view, TOKENS, setting[2])
        out = generate(setting, processor, num_beams=beams, num_return_sequences=beams, length_penalty=0.0)
        found = np.array(items_of(setting, out.sequences, ids)).reshape(3, beams)
        for row, want in zip(found, wanted, strict=True):
            assert set(row) <= want and len(set(row)) == beams
        # wide enough, the best of each list comes first
        out = generate(setting, processor, num_beams=len(ids), length_penalty=0.0)
        best = [max(want, key=lambda i: logp[i]) for want, logp in zip(wanted, exact, strict=True)]
        assert items_of(setting, out.sequences, ids) == best


def test_sampling_and_the_end(setting):
    ids = some_ids()
    processor = TrieLogitsProcessor(Trie(ids), TOKENS, setting[2], eos_token_id=EOS)
    torch.manual_seed(0)
    out = generate(setting, processor, do_sample=True, max_new_tokens=LEVELS + 3, eos_token_id=EOS)
    assert -1 not in items_of(setting, out.sequences, ids)
    assert out.sequences.shape[1] == setting[2] + LEVELS + 1 and (out.sequences[:, -1] == EOS).all()
    with pytest.raises(ValueError, match=f"asks for token 4 .* set max_new_tokens to {LEVELS}, or give"):
        generate(setting, TrieLogitsProcessor(Trie(ids), TOKENS, setting[2]), max_new_tokens=LEVELS + 1)


def test_words_among_the_codes_lead_nowhere():
    processor = TrieLogitsProcessor(Trie(some_ids()), TOKENS, 0)
    first = int(TOKENS[0, some_ids()[0, 0]])
    scores = processor(torch.tensor([[first], [2], [int(TOKENS[1, 0])], [10**6]]), torch.zeros(4, VOCABULARY))
    assert scores[0].isfinite().any() and not scores[1:].isfinite().any()


@pytest.mark.parametrize(
    "tokens,message",
    [
        (TOKENS[:2], r"tokens has levels of \[6, 6\] codes; the trie needs one token a code, for \[6, 6, 6\]"),
        (TOKENS[:, :5], r"levels of \[5, 5, 5\]"),
    ],
)
def test_tokens_that_do_not_fit(tokens, message):
    with pytest.raises(ValueError, match=message):
        TrieLogitsProcessor(Trie(some_ids()), tokens, 1)


def test_rows_that_do_not_fit_the_histories():
    processor = TrieLogitsProcessor(Trie(some_ids()).deny([[0], [1]]), TOKENS, 0)
    with pytest.raises(ValueError, match="3 rows for the lists of 2 histories"):
        processor(torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, VOCABULARY))
