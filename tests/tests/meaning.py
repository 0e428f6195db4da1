"""Unpacks layers in memory, by rules written down here and nowhere else, and lists the trees.

Reads one JSON object per line: {"id": ..., "model": "merged" | "overlay" | "podman" | "disk", "layers": [tar, ...] | "root": dir}. Prints
{"id": ..., "tree": [line, ...]} or {"id": ..., "error": text} for each.

merged   all layers in one tree, entry by entry, as umoci: whiteouts hide what lower layers have
overlay  each layer in a directory of its own, as containerd: whiteouts are nodes that must find their place free
podman   the same, and no path twice
disk     a directory that another tool made
"""
import hashlib
import json
import os
import posixpath
import stat
import sys
import tarfile


class Refused(Exception):
    pass


class Node:
    def __init__(self, kind, layer, mode=0o755, uid=0, mtime=0, data=None):
        self.kind, self.layer, self.mode, self.uid, self.mtime, self.data = kind, layer, mode, uid, mtime, data
        self.children = {} if kind == 'd' else None
        self.opaque = False
        # The last layer that linked to it.
        self.linked = layer
        # Names that a layer has put here, and which layer.
        self.own = {}


def entries(path):
    with tarfile.open(path, 'r:') as tar:
        for info in tar:
            name = posixpath.normpath('/' + info.name).lstrip('/')
            content = tar.extractfile(info).read() if info.isreg() else b''
            yield name, info, content


def made(info, content, layer):
    meta = dict(mode=info.mode & 0o7777, uid=info.uid, mtime=int(info.mtime))
    if info.isdir():
        return Node('d', layer, **meta)
    if info.issym():
        return Node('l', layer, data=info.linkname, **meta)
    if info.isfifo():
        return Node('p', layer, **meta)
    if info.isreg():
        return Node('f', layer, data=hashlib.sha256(content).hexdigest(), **meta)
    raise Refused('type of ' + info.name)


def resolve(root, path, layer, make):
    """The directory at path; symbolic links of the layer (or of any, for None) are followed, inside the tree."""
    todo = [part for part in reversed(path.split('/')) if part]
    stack, followed = [('', root)], 0
    while todo:
        part = todo.pop()
        if part in ('', '.'):
            continue
        if part == '..':
            if len(stack) > 1:
                stack.pop()
            continue
        here = stack[-1][1]
        child = here.children.get(part)
        if child is not None and layer is not None and child.layer != layer and child.linked == layer:
            raise Refused('below a link to a lower layer: ' + path)
        if child is None or (child.kind != 'd' and layer is not None and child.layer != layer):
            if make is None:
                return None
            child = make('/'.join([name for name, _ in stack[1:]] + [part]))
            here.children[part] = child
        if child.kind == 'l':
            followed += 1
            if followed > 40:
                raise Refused('links')
            if child.data.startswith('/'):
                stack = stack[:1]
            todo.extend(reversed(child.data.split('/')))
        elif child.kind != 'd':
            if make is None:
                return None
            raise Refused('below a file: ' + path)
        else:
            stack.append((part, child))
    if make is not None:
        for (_, above), (part, _) in zip(stack, stack[1:]):
            above.own[part] = layer
    return stack[-1][1]


def target(root, name, layer):
    name = posixpath.normpath('/' + name).lstrip('/')
    parent, base = posixpath.split(name)
    directory = resolve(root, parent, layer, None)
    found = directory and directory.children.get(base)
    if found is None or found.kind == 'd':
        raise Refused('no target ' + name)
    return found


def hide(directory, layer):
    """Takes lower layers out of a directory."""
    for name in list(directory.children):
        hide_name(directory, name, layer)


def hide_name(directory, name, layer):
    child = directory.children.get(name)
    if child is not None and directory.own.get(name) != layer:
        del directory.children[name]
    elif child is not None and child.kind == 'd':
        hide(child, layer)


def put(directory, base, node):
    before = directory.children.get(base)
    if node.kind == 'd' and before is not None and before.kind == 'd':
        before.mode, before.uid, before.mtime, before.layer = node.mode, node.uid, node.mtime, node.layer
    else:
        directory.children[base] = node


def merged(layers):
    root = Node('d', -1)
    for number, path in enumerate(layers):
        for name, info, content in entries(path):
            if not name:
                if not info.isdir():
                    raise Refused('root')
                root.mode, root.uid = info.mode & 0o7777, info.uid
                continue
            parent, base = posixpath.split(name)
            directory = resolve(root, parent, number, lambda _: Node('d', number))
            if base == '.wh..wh..opq':
                hide(directory, number)
            elif base.startswith('.wh.'):
                hide_name(directory, base[4:], number)
            else:
                if info.islnk():
                    directory.children[base] = target(root, info.linkname, None)
                    directory.children[base].linked = number
                else:
                    put(directory, base, made(info, content, number))
                directory.own[base] = number
    return root


def lower_directory(lowers, path):
    node = lowers
    for part in path.split('/'):
        node = node.children.get(part) if node is not None and node.kind == 'd' else None
    return node


def overlay(layers, no_duplicates=False):
    lowers = Node('d', -1)
    for number, path in enumerate(layers):
        upper, seen = Node('d', number), set()

        def parent_of(path):
            lower = lower_directory(lowers, path)
            if lower is not None and lower.kind == 'd':
                return Node('d', number, lower.mode, lower.uid, lower.mtime)
            return Node('d', number)

        for name, info, content in entries(path):
            if no_duplicates and name in seen:
                raise Refused('twice: ' + name)
            seen.add(name)
            if not name:
                if not info.isdir():
                    raise Refused('root')
                upper.mode, upper.uid = info.mode & 0o7777, info.uid
                continue
            parent, base = posixpath.split(name)
            directory = resolve(upper, parent, None, parent_of)
            if base == '.wh..wh..opq':
                directory.opaque = True
            elif base.startswith('.wh.'):
                if base[4:] in directory.children:
                    raise Refused('in the place of a whiteout: ' + name)
                directory.children[base[4:]] = Node('w', number)
            elif info.islnk():
                node = target(upper, info.linkname, None)
                directory.children[base] = node
            else:
                put(directory, base, made(info, content, number))
        lowers = stacked(lowers, upper)
    return lowers


def stacked(lower, upper):
    """What overlayfs shows of a directory."""
    shown = Node('d', upper.layer, upper.mode, upper.uid, upper.mtime)
    if not upper.opaque:
        shown.children.update(lower.children)
    for name, child in upper.children.items():
        below = shown.children.get(name)
        if child.kind == 'w':
            shown.children.pop(name, None)
        elif child.kind == 'd':
            shown.children[name] = stacked(below if below is not None and below.kind == 'd' else Node('d', -1), child)
        else:
            shown.children[name] = child
    return shown


def lines(root):
    found, first = [], {}

    def visit(node, path):
        for name in sorted(node.children):
            child = node.children[name]
            below = path + '/' + name if path else name
            found.append((below, child))
            if child.kind == 'd':
                visit(child, below)
            else:
                first[id(child)] = min(first.get(id(child), below), below)

    visit(root, '')
    out = []
    for path, node in sorted(found, key=lambda pair: pair[0]):
        out.append(line(path, node.kind, node.mode, node.uid, node.mtime, node.data, first.get(id(node), path)))
    return out


def line(path, kind, mode, uid, mtime, data, first):
    if kind == 'd':
        return f'{path} d {mode:o} {uid}'
    mode = 0o777 if kind == 'l' else mode
    return f'{path} {kind} {mode:o} {uid} {mtime} {data if data is not None else "-"} {first}'


def disk(root):
    found, first = [], {}
    for base, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(base, name)
            status = os.lstat(path)
            below = os.path.relpath(path, root)
            found.append((below, status, path))
            key = status.st_ino
            first[key] = min(first.get(key, below), below)
    out = []
    for below, status, path in sorted(found, key=lambda item: item[0]):
        mode, data = status.st_mode, None
        if stat.S_ISDIR(mode):
            kind = 'd'
        elif stat.S_ISLNK(mode):
            kind, data = 'l', os.readlink(path)
        elif stat.S_ISFIFO(mode):
            kind = 'p'
        else:
            kind, data = 'f', hashlib.sha256(open(path, 'rb').read()).hexdigest()
        out.append(line(below, kind, stat.S_IMODE(mode), status.st_uid, int(status.st_mtime), data, first[status.st_ino]))
    return out


MODELS = {
    'merged': lambda job: lines(merged(job['layers'])),
    'overlay': lambda job: lines(overlay(job['layers'])),
    'podman': lambda job: lines(overlay(job['layers'], no_duplicates=True)),
    'disk': lambda job: disk(job['root']),
}
OWN = ('.prefetch.landmark ', '.no.prefetch.landmark ', 'stargz.index.json ')
for text in sys.stdin:
    job = json.loads(text)
    try:
        tree = [one for one in MODELS[job['model']](job) if not one.startswith(OWN)]
        answer = {'id': job['id'], 'tree': tree}
    except Refused as refused:
        answer = {'id': job['id'], 'error': str(refused)}
    print(json.dumps(answer))
