"""Folders with the numbers of images in them, as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class FolderNode:
    """A folder with the numbers of images directly in it and in all of it."""

    def __init__(self, name: str = "", parent: FolderNode | None = None) -> None:
        self.name, self.parent = name, parent
        self.path: str = name if parent is None or not parent.path else f"{parent.path}/{name}"
        self.own = self.total = 0
        self.children: dict[str, FolderNode] = {}

    def add(self, num_images: int) -> None:
        """Add to the images of this folder and of those around it; subtract if negative."""
        node: FolderNode | None = self
        while node is not None:
            node.total += num_images
            node = node.parent

    def held(self) -> list[FolderNode]:
        """The children that hold images."""
        return [child for child in self.children.values() if child.total]

    def walk(self) -> Iterator[FolderNode]:
        """This folder and those below it that hold images, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.held()))


def folder_tree(folders: Mapping[str, int]) -> FolderNode:
    """The tree of `folders` ("train/cat", "" for the top), given with their numbers of images."""
    top = FolderNode()
    for path, num_images in folders.items():
        node = top
        for name in path.split("/") if path else ():
            if name not in node.children:
                node.children[name] = FolderNode(name, node)
            node = node.children[name]
        node.own += num_images
        node.add(num_images)
    return top
