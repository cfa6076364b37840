"""What `python -m eval.app` takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from eval.look.settings import SceneConfig


@dataclass
class AppConfig(SceneConfig):
    """What `python -m eval.app` takes: what the page shows, and whom it serves. `images`, `indices` and `num_images`
    name those that it offers, `sample` those of train that neighbours are looked for among.
    """

    neighbours: int = 12  # shown for an image
    k: int | None = None  # neighbours that vote on the class where no head names it; null: 20
    top: int = 5  # classes named, at most all
    host: str = "127.0.0.1"  # 0.0.0.0: whoever can reach this machine may use the page
    port: int = 8000  # 0: any that is free
    names: list[str] = field(default_factory=list)  # further names that browsers reach the server by, as of a proxy
    max_upload_mib: float = 20.0  # of an image's file
    max_megapixels: float = 50.0  # of an image, by its header
    queue: int = 8  # requests that wait for the model; more are asked to come again
    seconds: float = 60.0  # that a request may take
