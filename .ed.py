import pathlib
p=pathlib.Path('src/octavo/recipes/testbeds/students.py'); s=p.read_text()
a=s.index('def encoder('); b=s.index('def pretrained')
s=s[:a]+'''def encoder(lab: Lab, depth: int, seed: int, width: int = WIDTH) -> Any:
    """An untrained BERT without dropout, with as many heads as MiniLM, and an inner layer four times as wide.

    In quick runs it is a quarter as wide.
    """
    transformers, width = require_transformers(), width // 4 if lab.quick else width
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=TOKENS, hidden_size=width, num_hidden_layers=depth, num_attention_heads=12,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


'''+s[b:]
a=s.index('def pretrained'); b=s.index('class Classifier')
s=s[:a]+'''def pretrained(lab: Lab) -> Any:
    """MiniLM without dropout, which would blur what is taught; in quick runs an untrained encoder of as many layers."""
    if lab.quick:
        return encoder(lab, 6, 0, 2 * WIDTH).eval()
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = require_transformers().AutoModel.from_pretrained(
        minilm(), local_files_only=True, add_pooling_layer=False, **quiet
    )
    return model.eval()


'''+s[b:]
s=s.replace('''#: Tokens of MiniLM''','''#: Width of small students.
WIDTH = 96
#: Tokens of MiniLM''')
s=s.replace('Classifier(pretrained())','Classifier(pretrained(lab))')
s=s.replace('''    """MiniLM as a classifier of :func:`reviews`, trained once; in quick runs only the last linear layer is."""
''','''    """The model of :func:`pretrained` as a classifier of :func:`reviews`, trained once."""
''')
s=s.replace('''        if lab.quick:
            model.get_submodule("encoder").requires_grad_(False)
        some =''','''        some =''')
p.write_text(s)
p=pathlib.Path('src/octavo/recipes/pruning/minilm.py'); s=p.read_text()
s=s.replace('#: Layers and width of the student, layers of the assistant, and relation heads: as many as the teacher has.\nDEPTH, WIDTH, ASSISTANT, HEADS = 3, 96, 6, 12','#: Layers of the student, those of the assistant and the teacher, and relation heads: as many as the teacher has.\nDEPTH, ASSISTANT, HEADS = 3, 6, 12')
s=s.replace('pretrained()','pretrained(lab)').replace('encoder(DEPTH, WIDTH, seed)','encoder(lab, DEPTH, seed)').replace('encoder(ASSISTANT, WIDTH, seed)','encoder(lab, ASSISTANT, seed)')
p.write_text(s)
p=pathlib.Path('src/octavo/recipes/pruning/well_read.py'); s=p.read_text()
s=s.replace('''#: Layers and width of the student; steps of every arm, and those of them in which gaps are filled.
DEPTH, WIDTH, STEPS, PRETRAINED = 3, 96, 1000, 600''','''#: Layers of the student; steps of every arm, and those of them in which gaps are filled.
DEPTH, STEPS, PRETRAINED = 3, 700, 400''').replace('encoder(DEPTH, WIDTH, seed)','encoder(lab, DEPTH, seed)')
p.write_text(s)
