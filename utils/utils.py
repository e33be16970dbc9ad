"""Pictures of tensors: 8-bit conversion and a labelled grid."""

from PIL import Image, ImageDraw, ImageFont

from utils.metrics import to_uint8_range

GAP_PX = 4
TEXT_PX = 14
LINE_PX = 20


def to_uint8(images):
    """Images (..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8 on the CPU, rounded."""
    return to_uint8_range(images.detach()).byte().movedim(-3, -1).cpu().numpy()


def to_pil(image):
    """One image (3, H, W) in [-1, 1] as a PIL image."""
    return Image.fromarray(to_uint8(image))


def fit(image, cell_px):
    """A PIL image within a square cell: a larger one is shrunk with antialiasing, a smaller one is enlarged by a whole
    factor without smoothing, so that its pixels can be judged."""
    if max(image.size) > cell_px:
        image.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
        return image
    factor = cell_px // max(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def image_grid(rows, labels, captions=None, cell_px=256):
    """A grid of images as a PIL image, with a heading over each column.

    rows: list of rows of images, each (3, H, W) in [-1, 1]. labels: one heading per column. captions: one line of text
    per image, in the same nesting, or None. ValueError when a row has another number of columns."""
    captions = captions or [[""] * len(labels)] * len(rows)
    if not rows or {len(row) for row in [*rows, *captions]} != {len(labels)} or len(captions) != len(rows):
        raise ValueError(f"a grid of {len(labels)} labels needs rows and captions of {len(labels)}, got "
                         f"{[len(row) for row in rows]} and {[len(row) for row in captions]}")
    font = ImageFont.load_default(TEXT_PX)
    cells = [[fit(to_pil(image), cell_px) for image in row] for row in rows]
    line_px = LINE_PX if any(any(row) for row in captions) else 0
    heights = [max(cell.height for cell in row) + line_px for row in cells]
    width = GAP_PX + len(labels) * (cell_px + GAP_PX)
    grid = Image.new("RGB", (width, LINE_PX + sum(height + GAP_PX for height in heights)), "white")
    draw = ImageDraw.Draw(grid)
    lefts = [GAP_PX + column * (cell_px + GAP_PX) for column in range(len(labels))]
    for left, label in zip(lefts, labels, strict=True):
        draw.text((left + cell_px // 2, LINE_PX // 2), label, fill="black", font=font, anchor="mm")
    top = LINE_PX
    for row, texts, height in zip(cells, captions, heights, strict=True):
        for left, image, text in zip(lefts, row, texts, strict=True):
            grid.paste(image, (left + (cell_px - image.width) // 2, top))
            draw.text((left + cell_px // 2, top + height - line_px // 2), text, fill="black", font=font, anchor="mm")
        top += height + GAP_PX
    return grid
