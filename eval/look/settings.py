"""What `python -m eval.look` takes: what all looks share, and a group of settings for each look that has some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from eval.config import EvalDataConfig
from ssl.config import Device, ModelConfig, Precision


@dataclass
class ViewsConfig:
    """The views that the method trains on."""

    epochs: int = 1  # how many epochs' views of each image
    first_epoch: int = 0  # counted from 0


@dataclass
class ReconstructionsConfig:
    """What a masked image model makes of masked images."""

    mask_ratios: list[float] | None = None  # shares that are hidden; null: 0.5, 0.75, 0.9 and the run's own
    masks: int = 1  # different masks of each image
    sample: int = 64  # images over which the error is measured, where the data choose them


@dataclass
class PretextConfig:
    """Relative location's answers, and what a single patch gives away of where it comes from."""

    sample: int = 400  # images
    epoch: int = 0  # whose views and patches relative location is asked about
    patches: int | None = None  # of each image, for the probes; null: 4, or the 9 of relative location
    patch_size: int | None = None  # side in pixels of the image; null: half of it, or what relative location cuts
    shift: int = 1  # pixels by which one colour channel is displaced


@dataclass
class FiltersConfig:
    """What `what=filters` takes."""

    order: str = "norm"  # the greatest first; or index, as the layer has them
    num: int = 64  # filters shown
    num_components: int = 28  # principal components shown of a patch embedding, as in Dosovitskiy et al. 2020, Fig. 7


@dataclass
class ActivationsConfig:
    """What `what=activations` takes."""

    layer: str | None = None  # null: the last map, of a vision transformer the hidden units of the last block
    units: list[int] | None = None  # null: num_units that choose= picks
    choose: str = "variance"  # those that vary most; or random, a seeded draw of those alive
    num_units: int = 8  # that are shown
    num_patches: int = 8  # of each unit, each of another image


@dataclass
class AttentionConfig:
    """What `what=attention` takes."""

    layer: int | None = None  # block, from 0 or from the end -1; null: the last
    query: str | None = None  # class: the class token's row; mean: all patches' rows; null: class where there is one
    fusion: str = "mean"  # of heads, for the roll-out: mean, min or max
    discard: float = 0.0  # share of each row's weights, the least ones, that the roll-out leaves out


@dataclass
class PcaTokensConfig:
    """What `what=pca_tokens` takes."""

    layer: int | None = None  # block or stage, from 0 or from the end -1; null: the last
    without_place: bool = False  # take out of each token the mean of its place over the images
    foreground: str | None = None  # positive or negative: colour only tokens on that side of the first component


@dataclass
class SaliencyConfig:
    """Which pixels move the score, by its gradient."""

    target: Any = "auto"  # predicted, label, a class, contrast, norm, feature_<number>; auto: predicted, else contrast
    methods: list[str] = field(
        default_factory=lambda: ["gradient", "smoothgrad"]
    )  # of gradient, input_x_gradient, smoothgrad, integrated_gradients
    noise_samples: int = 16  # noisy copies of an image for smoothgrad
    noise: float = 0.15  # their standard deviation, as a share of the image's range
    steps: int = 32  # of integrated_gradients, from the mean colour to the image


@dataclass
class GuidedBackpropConfig:
    """The gradient with only positive parts let through."""

    target: Any = "auto"  # as saliency's


@dataclass
class OcclusionConfig:
    """How far the score falls where the image is covered."""

    target: Any = "auto"  # as saliency's, and similarity; auto: predicted, else similarity
    window: int | None = None  # side in pixels of what is covered; null: a sixth of the shorter side
    stride: int | None = None  # pixels by which it moves; null: half of it


@dataclass
class GradcamConfig:
    """Which places of a feature map raise the score."""

    target: Any = "auto"  # as saliency's
    layer: str | None = None  # a module's name; null: the last map that the score depends on in every place


@dataclass
class GradientAscentConfig:
    """Images that are made to activate a unit."""

    layer: str | None = None  # a module's name, features or logits; null: logits where there is a classifier
    units: list[Any] | None = None  # numbers of channels, or names of classes; null: num_units of them, by the seed
    num_units: int = 6  # that are shown
    place: str = "mean"  # of a map: mean of all places, or centre
    steps: int = 80  # of the ascent
    step_size: float = 0.1  # mean change of a value in the first step, in standard deviations of the data
    jitter: int | None = None  # pixels by which the image is moved in a step, at most; null: 1/16 of the shorter side
    l2_decay: float = 0.005  # share of the image that is lost in a step
    blur_every: int = 4  # steps; 0: never
    blur_sigma: float = 0.5  # pixels
    clip_norm: float = 0.0  # share of pixels, those of least norm, that are set to the mean colour in a step
    clip_contribution: float = 0.0  # the same of those that contribute least to the activation


@dataclass
class DeepdreamConfig:
    """More of what a layer sees in an image."""

    layer: str | None = None  # a module's name; null: two thirds of the way through the network
    octaves: int = 3  # sizes of the image, from small to full
    octave_scale: float = 1.4  # of each size on the one before
    steps: int = 10  # for each octave
    step_size: float = 0.04  # mean change of a value in a step, in standard deviations of the data
    jitter: int | None = None  # pixels; null: 1/8 of the shorter side


@dataclass
class InversionConfig:
    """Images made again from their features."""

    layers: list[str] | None = None  # modules' names, and features; null: four depths and features
    num_images: int = 2  # of those shown, the first
    steps: int = 100  # of the descent
    step_size: float = 0.1  # of Adam at the start, in standard deviations of the data
    total_variation: float = 0.05  # weight of the mean squared difference of neighbouring pixels
    alpha_norm: float = 0.001  # weight of the mean sixth power of values


@dataclass
class NeighboursConfig:
    """The nearest images of train."""

    count: int = 8  # shown, and voted with, for each image


@dataclass
class MapConfig:
    """Features in two dimensions."""

    projections: list[str] = field(default_factory=lambda: ["pca", "tsne"])  # of pca, tsne, umap
    perplexity: float | None = None  # of t-SNE; null: 30, or a third of the images where they are few
    umap_neighbours: int | None = None  # of each image, for UMAP; null: 15, or all others where they are few
    thumbnail: int = 40  # pixels of each image on the page


@dataclass
class ClustersConfig:
    """K-means, and labels that disagree with their surroundings."""

    count: int | None = None  # clusters; null: as many as classes, 10 without labels
    spherical: bool = True  # by cosine similarity; false: by distance
    images: int = 6  # nearest to each centroid, and as many doubtful ones
    neighbours: int = 20  # that vote on the label of each image
    margin: float = 0.5  # by which another class must win the vote for a label to be suspected


@dataclass
class OutliersConfig:
    """Images far from all others."""

    neighbours: int = 10  # whose mean distance counts
    threshold: float = 3.5  # robust z-score from which an image is called an outlier


@dataclass
class DuplicatesConfig:
    """Near-identical images within and across splits."""

    images: int | None = None  # of each split; null: all, with what=all at most 20,000
    neighbours: int = 5  # of each image that are compared with it pixel by pixel
    similarity: float | None = None  # cosine from which they are; null: that of copies made of some images
    correlation: float = 0.9  # of the aligned pictures, from which two images look alike, if their colours do
    flip: bool = True  # compare mirrored images too


@dataclass
class SceneConfig:
    """What a scene is made of: a checkpoint, the images to look at, and those that they are compared with."""

    ckpt: str | None = None  # a run folder, a checkpoint in it, an export, timm:<name>, a file, or `random`
    model: ModelConfig | None = None  # with ckpt=random, or a file of another project's weights
    data: EvalDataConfig = MISSING
    images: Any = None  # files to look at instead of some of the data's: a file, a folder, a glob, or a list of those
    indices: list[int] | None = None  # images of `split` to look at
    num_images: int = 8  # of a seeded sample of `split`, where neither images nor indices are given
    split: str | None = None  # train or test; null: test where the data have one
    sample: int = 2000  # images whose features are compared
    head: str | None = None  # folder of a probed head; null: the checkpoint's own, where it has one
    trust: list[str] = field(default_factory=list)  # packages whose methods a checkpoint may name, beside ssl.methods
    seed: int = 0  # of what is drawn: samples, masks, noise
    device: Device = Device.auto  # auto: the GPU where there is one
    precision: Precision = Precision.fp32  # of features; gradients and maps are always of fp32
    pooling: str = "model"  # as in the evaluations
    batch_size: int = 64  # images that the backbone takes at once
    threads: int | None = None  # null: the cores that this process may use


@dataclass
class LookConfig(SceneConfig):
    """What `python -m eval.look` takes."""

    what: Any = None  # a look, a list of them, or all
    out: str | None = None  # folder; null: <run folder>/look
    views: ViewsConfig = field(default_factory=ViewsConfig)
    reconstructions: ReconstructionsConfig = field(default_factory=ReconstructionsConfig)
    pretext: PretextConfig = field(default_factory=PretextConfig)
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    map: MapConfig = field(default_factory=MapConfig)
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    pca_tokens: PcaTokensConfig = field(default_factory=PcaTokensConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    guided_backprop: GuidedBackpropConfig = field(default_factory=GuidedBackpropConfig)
    occlusion: OcclusionConfig = field(default_factory=OcclusionConfig)
    gradcam: GradcamConfig = field(default_factory=GradcamConfig)
    gradient_ascent: GradientAscentConfig = field(default_factory=GradientAscentConfig)
    deepdream: DeepdreamConfig = field(default_factory=DeepdreamConfig)
    inversion: InversionConfig = field(default_factory=InversionConfig)
