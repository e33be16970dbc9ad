"""Images for validation, which training never sees."""

from my_dataset.dataset_deg_paired import DegDataset, check_no_overlap, folder_records, heldout_seed, pair_records
from my_dataset.degradations import parse_range
from my_dataset.images import list_images, load_rgb


def heldout_from_args(args, training, degrade):
    """The first --num_validation_images items of --heldout_root (with --heldout_lr_root: stored pairs), centre
    crops, degraded with their own fixed seeds; [] without --heldout_root. ValueError if one's file is a training
    image's, for which a stream, that is read only later, is not searched."""
    if not args.heldout_root:
        if args.heldout_lr_root:
            raise ValueError("--heldout_lr_root needs --heldout_root with the clean images of the pairs")
        return []
    if args.heldout_lr_root:
        records = pair_records(args.heldout_lr_root, args.heldout_root)
    else:
        records = folder_records(args.heldout_root)
        if degrade is None or training.is_paired:
            raise ValueError("--heldout_root beside stored pairs needs --heldout_lr_root with their degraded partners")
    if training.stream is None:
        check_no_overlap([record.target for record in training.records], [record.target for record in records])
    dataset = DegDataset(records, degrade, args.resolution, crop="center", seed=heldout_seed(args.seed),
                         upscale_kernel=args.upscale_kernel, max_pixels=args.max_pixels,
                         crop_zoom=parse_range(args.crop_zoom, "--crop_zoom", 1))
    return [dataset[i] for i in range(min(args.num_validation_images, len(dataset)))]


def load_validation_images(args):
    """(H, W, 3) uint8 of --validation_image, a file or a folder; [] without it."""
    paths = list_images(args.validation_image) if args.validation_image else []
    return [load_rgb(path, args.max_pixels) for path in paths]
