import pathlib
p=pathlib.Path('src/octavo/training/teaching/lesson.py'); s=p.read_text()
s=s.replace('''        maps = nn.ModuleDict()
''','''        maps = _Maps()
''')
s=s.replace('''def _listed(model''','''class _Maps(nn.ModuleDict):
    """Learned maps as a child of the student. A ``Sequential`` runs all its children, and this one changes nothing."""

    def forward(self, x: Any) -> Any:
        return x


def _listed(model''',1)
p.write_text(s)
