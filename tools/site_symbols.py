"""Public names of a chapter, read from its source: signatures, docments, bases and errors"""

import ast
import io
import tokenize


class Symbol:
    "A public name: what it is called, takes, gives and says"

    def __init__(self, chapter, cell, name, kind, node=None, comments=None, bases=(), value=''):
        self.chapter = chapter
        self.cell = cell
        self.name = name
        self.kind = kind
        self.members = []
        self.value = value
        self.doc = ''
        self.args = []
        self.gives = None
        self.note = ''
        self.bases = []
        self.raises = []
        self.checks = []
        if isinstance(node, ast.ClassDef):
            self.read_class(node, comments)
        elif node is not None:
            self.doc = ast.get_docstring(node) or ''
            self.read_args(node, comments)
            self.raises = raised(node)
            self.checks = checks(node)

    @property
    def full(self):
        return f'{self.chapter.module}.{self.name}'

    def read_args(self, node, comments):
        a = node.args
        said = {}
        plain = a.posonlyargs + a.args
        defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
        rows = [('', o, d) for o, d in zip(plain, defaults)]
        if a.vararg:
            rows.append(('*', a.vararg, None))
        elif a.kwonlyargs:
            rows.append(('*', None, None))
        rows += [('', o, d) for o, d in zip(a.kwonlyargs, a.kw_defaults)] + (
            [('**', a.kwarg, None)] if a.kwarg else []
        )
        for _, o, d in rows:
            if o:
                said[(d or o).end_lineno] = (
                    o.arg
                )  # a comment belongs to the last argument on its line
        spread = any(o and o.lineno > node.lineno for _, o, _ in rows)
        for star, o, d in rows:
            if o is None:
                self.args.append(('*', '', '', ''))
                continue
            last = (d or o).end_lineno
            says = comments.get(last, '') if spread and said[last] == o.arg else ''
            says = says or comment_above(o.lineno, comments)
            self.args.append(
                (
                    star + o.arg,
                    ast.unparse(o.annotation) if o.annotation else '',
                    ast.unparse(d) if d else '',
                    says,
                )
            )
        if self.kind != 'function' and self.args and self.args[0][0] in ('self', 'cls', 'ctx'):
            self.args.pop(0)
        end = node.returns.end_lineno if node.returns else node.lineno
        if node.returns:
            self.gives = (
                ast.unparse(node.returns),
                comments.get(end, '') if spread or end < node.body[0].lineno else '',
            )
        elif not spread and node.body[0].lineno > node.lineno:
            self.note = comments.get(node.lineno, '')

    def read_class(self, node, comments):
        self.doc = ast.get_docstring(node) or ''
        self.bases = [ast.unparse(base) for base in node.bases]
        fields = [
            o for o in node.body if isinstance(o, ast.AnnAssign) and isinstance(o.target, ast.Name)
        ]
        is_dataclass = any('dataclass' in ast.unparse(d) for d in node.decorator_list)
        if is_dataclass or 'NamedTuple' in self.bases:
            self.args = [
                (
                    o.target.id,
                    ast.unparse(o.annotation),
                    ast.unparse(o.value) if o.value else '',
                    comments.get(o.end_lineno, '') or comment_above(o.lineno, comments),
                )
                for o in fields
            ]
        for o in node.body:
            if not isinstance(o, ast.FunctionDef):
                continue
            m = method(o, comments, self.chapter, self.cell, self.name)
            if o.name == '__init__':
                self.args = m.args
                self.raises, self.checks = m.raises, m.checks
            elif not o.name.startswith('_') and (m.doc or any(a[3] for a in m.args)):
                self.members.append(m)


def method(node, comments, chapter, cell, owner):
    "A method of a class, defined in it or patched on"
    marks = ' '.join(ast.unparse(d) for d in node.decorator_list)
    kind = (
        'property'
        if 'property' in marks or 'as_prop' in marks
        else 'classmethod'
        if 'classmethod' in marks or 'cls_method' in marks
        else 'staticmethod'
        if 'staticmethod' in marks
        else 'method'
    )
    return Symbol(chapter, cell, f'{owner}.{node.name}', kind, node, comments)


def message_of(node):
    "What an error says, with the names of what is filled in; '' if it is not written there"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        pieces = (
            o.value if isinstance(o, ast.Constant) else f'{{{ast.unparse(o.value)}}}'
            for o in node.values
        )
        return ''.join(pieces)
    return ''


def raised(node):
    "Errors that a function raises itself: (name of the error, what it says)"
    found = []
    for o in ast.walk(node):
        if not isinstance(o, ast.Raise) or not isinstance(o.exc, ast.Call):
            continue
        error = ast.unparse(o.exc.func)
        says = message_of(o.exc.args[0]) if o.exc.args else ''
        if error[:1].isupper() and (error, says) not in found:
            found.append((error, says))
    return found


def private_errors(cells):
    "Errors of the functions of exported cells that begin with an underscore: {name: errors}"
    nodes = [o for code in cells for o in ast.parse(code).body]
    return {
        o.name: raised(o)
        for o in nodes
        if isinstance(o, ast.FunctionDef) and o.name.startswith('_')
    }


def checks(node):
    "Names of the functions of checks that a function calls: their errors are its own"
    names = (o.func.id for o in ast.walk(node) if isinstance(o, ast.Call) and hasattr(o.func, 'id'))
    return [name for name in names if name.lstrip('_').startswith('check')]


def comments_of(code):
    "Comments by line; one that has a line of its own stands under the negative number"
    found = {}
    for t in tokenize.generate_tokens(io.StringIO(code + '\n').readline):
        if t.type == tokenize.COMMENT:
            alone = t.line.strip().startswith('#')
            found[-t.start[0] if alone else t.start[0]] = t.string.lstrip('# ').strip()
    return found


def comment_above(line, comments):
    "What the comment lines right above a line say: a long docment stands there"
    said = []
    while -(line - 1) in comments:
        line -= 1
        said.insert(0, comments[-line])
    return ' '.join(said)


def symbols(code, chapter, cell):
    "Public names that an exported cell defines"
    comments = comments_of(code)
    for node in ast.parse(code).body:
        name = getattr(node, 'name', '')
        if isinstance(node, ast.FunctionDef) and any(
            'patch' in ast.unparse(d) for d in node.decorator_list
        ):
            owner = ast.unparse(node.args.args[0].annotation)
            if not name.startswith('_'):
                yield method(node, comments, chapter, cell, owner)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not name.startswith('_'):
            yield Symbol(
                chapter,
                cell,
                name,
                'class' if isinstance(node, ast.ClassDef) else 'function',
                node,
                comments,
            )
        elif isinstance(node, ast.Assign):
            names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            values = (
                node.value.elts
                if isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(names) > 1
                else [node.value] * len(names)
            )
            for n, v in zip(names, values):
                if not isinstance(n, ast.Name) or not n.id.isupper() or n.id.startswith('_'):
                    continue
                s = Symbol(
                    chapter,
                    cell,
                    n.id,
                    'data',
                    value=ast.unparse(v)
                    if len(names) == len(values) and len(ast.unparse(v)) < 60
                    else '',
                )
                s.doc = comments.get(node.end_lineno, '')
                yield s
