//! Random layers against a naive model of the merge: paths in a map, one entry after the other.

use super::*;

/// The same rules on a flat map from paths to nodes.
#[derive(Default)]
struct Model {
    nodes: BTreeMap<Vec<String>, usize>,
    /// Layer, uid and kind.
    arena: Vec<(usize, u32, Shape)>,
    /// The last layer that linked to each.
    linked: BTreeMap<usize, usize>,
}

#[derive(Clone, PartialEq)]
enum Shape {
    Directory,
    File(usize, usize),
    Symlink(String),
    Link(Vec<String>),
}

impl Model {
    fn remove(&mut self, path: &[String]) {
        self.nodes.retain(|key, _| !key.starts_with(path));
    }

    fn put(&mut self, path: &[String], layer: usize, uid: u32, shape: Shape) {
        self.remove(path);
        self.arena.push((layer, uid, shape));
        self.nodes.insert(path.to_vec(), self.arena.len() - 1);
    }

    fn get(&self, path: &[String]) -> Option<&(usize, u32, Shape)> {
        self.nodes.get(path).map(|id| &self.arena[*id])
    }

    /// Where a path leads: links of `layer` (or of any, for `None`) are followed, the last component is not.
    fn walk(&self, path: &[String], layer: Option<usize>) -> Result<Vec<String>, ()> {
        let mut todo = path.to_vec();
        let mut done: Vec<String> = Vec::new();
        let mut followed = 0;
        while !todo.is_empty() {
            match todo.remove(0).as_str() {
                "" => {}
                ".." => drop(done.pop()),
                name => done.push(name.to_string()),
            }
            if todo.is_empty() {
                break;
            }
            let linked = self.nodes.get(&done).and_then(|id| self.linked.get(id));
            match self.get(&done) {
                Some((of, ..)) if layer.is_some_and(|layer| layer != *of && linked == Some(&layer)) => {
                    return Err(());
                }
                Some((of, _, Shape::Symlink(target))) if layer.is_none_or(|layer| layer == *of) => {
                    followed += 1;
                    if followed > 40 {
                        return Err(());
                    }
                    let rest = std::mem::replace(&mut todo, target.split('/').map(String::from).collect());
                    todo.extend(rest);
                    done.pop();
                    if target.starts_with('/') {
                        done.clear();
                    }
                }
                Some((_, _, Shape::Directory)) | None => {}
                Some((of, ..)) if layer.is_some_and(|layer| layer != *of) => {}
                Some(_) => return Err(()),
            }
        }
        Ok(done)
    }

    fn split(path: &EntryPath) -> Vec<String> {
        path.components()
            .map(|name| String::from_utf8(name.to_vec()).unwrap())
            .collect()
    }

    /// Adds an entry, unless it is a whiteout or opaque mark. Returns where it lies.
    fn enter(&mut self, number: usize, index: usize, entry: &Entry) -> Result<Vec<String>, ()> {
        let path = self.walk(&Self::split(&entry.path), Some(number))?;
        for length in 1..path.len() {
            if !matches!(self.get(&path[..length]), Some((_, _, Shape::Directory))) {
                self.put(&path[..length], number, 0, Shape::Directory);
            }
        }
        if path.last().unwrap().starts_with(".wh.") {
            return Ok(path);
        }
        let uid = entry.metadata.uid;
        match &entry.kind {
            EntryKind::Directory => match self.nodes.get(&path).map(|id| &mut self.arena[*id]) {
                Some(node) if node.2 == Shape::Directory => (node.0, node.1) = (number, uid),
                _ => self.put(&path, number, uid, Shape::Directory),
            },
            EntryKind::Symlink(target) => {
                let target = String::from_utf8(target.to_vec()).unwrap();
                self.put(&path, number, uid, Shape::Symlink(target));
            }
            EntryKind::Hardlink(target) => {
                let target = Self::split(target);
                let known = self
                    .walk(&target, None)
                    .ok()
                    .and_then(|target| self.nodes.get(&target).copied());
                match known.filter(|id| {
                    let (_, _, shape) = &self.arena[*id];
                    matches!(shape, Shape::File(..) | Shape::Symlink(_))
                }) {
                    Some(id) => {
                        if self.arena[id].0 == number {
                            self.arena[id].1 = uid;
                        }
                        self.linked.insert(id, number);
                        self.remove(&path);
                        self.nodes.insert(path.clone(), id);
                    }
                    None => self.put(&path, number, uid, Shape::Link(target)),
                }
            }
            _ => self.put(&path, number, uid, Shape::File(number, index)),
        }
        Ok(path)
    }

    fn apply(&mut self, number: usize, layer: &LayerIndex) -> Result<(), ()> {
        // Where symbolic links lead at that time, the layer by itself tells.
        let mut alone = Some(Self::default());
        for (index, entry) in layer.entries.iter().enumerate() {
            let known = alone
                .as_mut()
                .and_then(|alone| alone.enter(number, index, entry).ok());
            if known.is_none() {
                alone = None;
            }
            let mut path = known.unwrap_or_else(|| Self::split(&entry.path));
            let name = path.pop().unwrap();
            if name == ".wh..wh..opq" {
                self.nodes
                    .retain(|key, _| !(key.starts_with(&path) && key.len() > path.len()));
            } else if let Some(name) = name.strip_prefix(".wh.") {
                path.push(name.to_string());
                self.remove(&path);
            }
        }
        for (index, entry) in layer.entries.iter().enumerate() {
            self.enter(number, index, entry)?;
        }
        // Links without their target yet: one after the other, as long as anything changes.
        let mut resolved = Vec::new();
        loop {
            let links = self
                .nodes
                .iter()
                .filter_map(|(path, id)| match &self.arena[*id].2 {
                    Shape::Link(target) => Some((path.clone(), *id, target.clone())),
                    _ => None,
                });
            let links: Vec<_> = links.collect();
            if links.is_empty() {
                break;
            }
            let mut changed = false;
            for (path, link, target) in links {
                let id = *self.nodes.get(&self.walk(&target, None)?).ok_or(())?;
                match self.arena[id].2 {
                    Shape::Directory => return Err(()),
                    Shape::Link(_) => {}
                    _ => {
                        self.nodes.insert(path, id);
                        resolved.push((link, id));
                        changed = true;
                    }
                }
            }
            if !changed {
                return Err(());
            }
        }
        resolved.sort_unstable();
        for (link, id) in resolved {
            if id < link {
                self.arena[id].1 = self.arena[link].1;
            }
        }
        Ok(())
    }

    fn show(&self) -> Vec<String> {
        let line = |(path, id): (&Vec<String>, &usize)| {
            let path = path.join("/");
            let (_, uid, shape) = &self.arena[*id];
            let links = self.nodes.values().filter(|other| *other == id).count();
            let mut line = match shape {
                Shape::Directory => format!("d {path}"),
                Shape::File(layer, index) => format!("f {path} {layer}.{index}"),
                Shape::Symlink(target) => format!("s {path} {target}"),
                Shape::Link(_) => format!("unresolved {path}"),
            };
            if *uid != 0 {
                line += &format!(" @{uid}");
            }
            if links != 1 {
                line += &format!(" x{links}");
            }
            line
        };
        self.nodes.iter().map(line).collect()
    }
}

fn random_layers() -> impl Strategy<Value = Vec<LayerIndex>> {
    let name = || proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4);
    let joined = move || name().prop_map(|names| names.join("/"));
    let line = prop_oneof![
        4 => joined().prop_map(|path| format!("d {path}")),
        6 => joined().prop_map(|path| format!("f {path} 1")),
        2 => (joined(), joined()).prop_map(|(path, target)| format!("h {path} {target}")),
        1 => (joined(), joined(), prop_oneof![Just(""), Just("/"), Just("../")])
            .prop_map(|(path, target, start)| format!("s {path} {start}{target}")),
        2 => name().prop_map(|names| {
            let (last, parents) = names.split_last().unwrap();
            let start: String = parents.iter().map(|name| format!("{name}/")).collect();
            format!("f {start}.wh.{last} -")
        }),
        1 => joined().prop_map(|path| format!("f {path}/.wh..wh..opq -")),
    ];
    let line = (line, 0..5).prop_map(|(line, uid)| format!("{line} @{uid}"));
    let layer =
        proptest::collection::vec(line, 0..8).prop_map(|lines| layer(lines.iter().map(|line| parse(line))));
    proptest::collection::vec(layer, 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn merging_equals_the_model(layers in random_layers()) {
        let mut model = Model::default();
        let modelled = layers.iter().enumerate().try_for_each(|(number, layer)| model.apply(number, layer));
        match Tree::merge(&layers) {
            Err(error) => prop_assert!(modelled.is_err(), "{error}"),
            Ok(tree) => {
                prop_assert!(modelled.is_ok());
                prop_assert_eq!(show(&tree, &layers), model.show());
            }
        }
    }
}
