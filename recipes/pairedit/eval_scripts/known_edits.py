"""How well a slider follows an edit that is known (edits.py): how far it goes, how evenly, and what it leaves alone."""

import numpy as np
from scipy import stats

from recipes.pairedit.edits import gradients, luminance

OUTSIDE = 0.05  # a pixel is outside a local edit where its mask is below


def measure(images, edit):
    """What the known `edit` (an Edit) says of one image at S slider values.

    images: (S, 3, H, W) in [0, 1], the first without the edit. Returns {name: list of S floats}: attribute;
    attribute_of_edit, the attribute of the edit itself applied to the first image; edit_share, the share of the edit's
    change that is reached, NaN where the edit changes nothing; and what was left alone: outside_change of a local edit,
    gradient_correlation of a global one."""
    mask = [edit.mask(images[:1])] if edit.mask else []
    attribute = edit.attribute(images, *mask).double().cpu().numpy()
    attribute_of_edit = edit.attribute(edit.apply(images[:1]), *mask).double().cpu().numpy().repeat(len(images))
    kept = ({"outside_change": outside_change(images, *mask)} if mask else
            {"gradient_correlation": gradient_correlation(images)})
    return {"attribute": attribute.tolist(), "attribute_of_edit": attribute_of_edit.tolist(),
            "edit_share": edit_share(attribute[None], attribute[:1], attribute_of_edit[:1]).tolist()} | kept


def edit_share(attributes, unedited, of_edit):
    """Share of the true edit's change that is reached at S slider values, (S,), of the mean over N images:
    (mean a - mean a_0) / (mean a_edit - mean a_0). attributes: (N, S), a. unedited: (N,), a_0 at scale 0. of_edit:
    (N,), a_edit. NaN where the edit does not change the mean."""
    change = np.mean(of_edit) - np.mean(unedited)
    reached = np.mean(attributes, axis=0) - np.mean(unedited)
    return reached / change if abs(change) > 1e-6 else np.full(reached.shape, np.nan)


def outside_change(images, mask):
    """Mean |difference| to the first image, S floats, of images (S, 3, H, W) in [0, 1] over the pixels where the mask
    (1, 1, H, W) is below 0.05; NaN where there is none."""
    outside = (mask < OUTSIDE)[0, 0]
    return (images - images[:1]).abs()[..., outside].mean((1, 2)).tolist()


def gradient_correlation(images):
    """Pearson correlation of the luminance gradients, horizontal and vertical in one, with those of the first image, S
    floats, of images (S, 3, H, W). NaN of a flat image."""
    across, down = gradients(luminance(images).double())
    values = np.concatenate([across.flatten(1).cpu().numpy(), down.flatten(1).cpu().numpy()], axis=1)
    return [linear(values[0], row) for row in values]


def linear(x, y):
    """Pearson correlation; NaN where one of them is constant or not finite."""
    if not (np.isfinite(y).all() and np.ptp(x) and np.ptp(y)):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def monotonicity(scales, values):
    """{"linear": Pearson's, "spearman": rank correlation} of a measure with the slider's values, both (S,); NaN for
    fewer than three values, whose correlation says nothing, and for a constant measure."""
    known = len(scales) > 2 and not np.isnan(linear(scales, values))
    return {"linear": linear(scales, values) if known else float("nan"),
            "spearman": float(stats.spearmanr(scales, values).statistic) if known else float("nan")}
