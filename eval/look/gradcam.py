"""`what=gradcam`: which places of a network's last map raise the score (Selvaraju et al. 2017, arXiv:1610.02391,
equations 1 and 2).

Maps with channels last and tokens on a grid are maps too; captum's LayerGradCam reads channels first alone, and gives
the same there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.look.attribution import heat_look, in_batches, rows_of, start
from eval.look.layer_places import Places, choose_layer, find_places, large_enough
from eval.look.layer_values import hooked, main_maps
from eval.look.result import DoesNotApply, Look
from eval.look.target import Score, make_target

if TYPE_CHECKING:
    from eval.look.scene import Scene


def look(scene: Scene) -> Look:
    """A map for each image that is shown."""
    settings = scene.config.gradcam
    shown = scene.shown()
    target = make_target(scene, shown, settings.target, setting="gradcam.target", gradient=True)
    places = find_places(target.network, image_size=scene.image_size, in_chans=scene.channels)
    if settings.layer is None:
        layer = last_map(target.network, target.score, shown.image, places)
    else:
        layer = choose_layer(places, settings.layer, model=target.network, key="gradcam.layer")
    batch_size = scene.config.batch_size
    start("gradcam", target.score, shown.image[:batch_size], num=len(shown))
    heat = in_batches(  # (B, h, w)
        lambda score, image: gradcam(target.network, score, image, layer), target.score, shown.image, batch_size
    )
    rows, columns = layer.grid_size
    return heat_look(
        scene,
        shown,
        target,
        {"Grad-CAM": heat.cpu().numpy()},
        title=f"Grad-CAM of the {target.meaning}, on the {rows} x {columns} places of {layer.layer}",
        data={"layer": layer.layer, "grid_size": [rows, columns]},
        lines=[f"layer: {layer.layer} ({layer.kind}), {rows} x {columns} places of {layer.num_units} channels"],
    )


def last_map(network: nn.Module, score: Score, image: Tensor, places: dict[str, Places]) -> Places:
    """The last of a network's stages and blocks on whose places, not just on whose class token, the score depends.

    Behind the last block of a vision transformer that is read from its class token no patch matters any more; the map
    is that which enters this block. Maps of fewer than 4 x 4 places, as small images have at the end, are passed over
    where there are others. Raises DoesNotApply where the network has no map.
    """
    candidates = main_maps(places)
    candidates = [candidates[number] for number in large_enough([each.grid_size for each in candidates])]
    if not candidates:
        raise DoesNotApply(f"{type(network).__name__} has no layer whose values have places on the image")
    outputs, names = {}, {network.get_submodule(each.layer): each.layer for each in candidates}

    def keep(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        outputs[names[module]] = output
        return output.clone()  # what follows may change it in place

    with torch.enable_grad(), hooked(names, keep):
        value = score(image[:1].detach().clone().requires_grad_(), rows_of(image[:1])).sum()
        given = {name: output for name, output in outputs.items() if output.requires_grad}
        found = torch.autograd.grad(value, list(given.values()), allow_unused=True)
    gradients = dict(zip(given, found))
    for each in reversed(candidates):
        gradient = gradients.get(each.layer)
        if gradient is not None and each.values(gradient).abs().sum() > 0:
            return each
    raise DoesNotApply("the score does not depend on any map of this network; give another gradcam.target")


def gradcam(network: nn.Module, score: Score, image: Tensor, layer: Places) -> Tensor:
    """The map (B, h, w) of images (B, C, H, W): channels weighted by their mean gradient, where positive."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # what follows may change it in place

    with torch.enable_grad(), hooked([network.get_submodule(layer.layer)], keep):
        value = score(image.detach().clone().requires_grad_(), rows_of(image)).sum()
        (gradient,) = torch.autograd.grad(value, outputs[:1])
    weights = layer.values(gradient).mean(2, keepdim=True)  # (B, C, 1)
    heat = functional.relu((weights * layer.values(outputs[0].detach())).sum(1))  # (B, h*w)
    return heat.reshape(len(image), *layer.grid_size)
