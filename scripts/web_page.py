"""The web demo's page: its tabs and what their buttons do, in Gradio."""

import contextlib
import html
import json
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import gradio as gr

from my_dataset.degradations import PRESETS as DEGRADATION_PRESETS
from my_dataset.images import EXTENSIONS
from scripts import web_jobs as jobs
from scripts.preview_degradations import describe
from utils.color import COLOR_FIXES
from utils.parse import is_ours

KEEP_UPLOADS_S = 24 * 3600
TILES = ("auto", "0", "128", "256", "512", "1024")
FORMATS = (("as uploaded", "auto"), ("PNG", "png"), ("JPEG", "jpg"), ("WebP", "webp"))
FONTS = ("system-ui", "sans-serif")
MONO_FONTS = ("ui-monospace", "monospace")
CSS = """
.gradio-container {max-width: 1320px !important; margin: auto}
#title p {color: var(--body-text-color-subdued)}
.examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
.examples, .examples .grid-wrap {min-height: 0 !important; height: auto !important}
/* Where a file was refused, the word "Error" must not take the next one's drop: the browser would open the file. */
.dropzone .wrap:has(> .error) {pointer-events: none}
.dropzone .wrap:has(> .error) .clear-status {pointer-events: auto}
@media (max-width: 520px) {.tabs {max-width: calc(100vw - 64px)}}
"""
INTRO = """# Photo restoration
Drop a photograph, press **Restore**, and drag the line across the picture to compare. Nothing leaves this server."""


@contextlib.contextmanager
def told_to_user():
    """Errors as one line on the page: the text of this project's own, for others none, with a traceback on stderr."""
    try:
        yield
    except jobs.Stopped:
        raise
    except Exception as error:
        text = "Something went wrong here. It is not your photograph's fault; the server's log says more."
        if isinstance(error, ValueError) and is_ours(error):
            text = html.escape(" ".join(str(error).split()))
        else:
            traceback.print_exc()
        raise gr.Error(text, title="That did not work", print_exception=False) from error


def stop_jobs(served, session, kind=None):
    """Stop the jobs of a session, or its job of one kind: at the next call of the model, or before it begins."""
    for events in (served.waiting, served.running):
        for key, event in list(events.items()):
            if key[0] == session and kind in (None, key[1]):
                event.set()


def start_and_stop(served, start, stop, work, inputs, outputs, shown, run_options):
    """Have two buttons start and stop the job work(event, *inputs), whose `outputs` are emptied first: what stays empty
    has no result. A job that waits for its turn can be stopped too. shown: the output that shows the progress."""
    kind = work.__name__

    def begin(request: gr.Request):
        served.waiting[request.session_hash, kind] = threading.Event()
        return [gr.DownloadButton(value=None, interactive=False) if isinstance(output, gr.DownloadButton) else None
                for output in outputs]

    def run(request: gr.Request, *values):
        key = request.session_hash, kind
        event = served.running[key] = served.waiting.pop(key, None) or threading.Event()
        try:
            with told_to_user():
                return work(event, *values)
        except jobs.Stopped:
            gr.Info("Stopped.")
            return gr.skip()
        finally:
            served.running.pop(key, None)

    def end(request: gr.Request):
        stop_jobs(served, request.session_hash, kind)

    quick = {"queue": False, "show_progress": "hidden"}
    start.click(begin, None, outputs, **quick).then(run, inputs, outputs, show_progress_on=shown, api_name=kind,
                                                    **run_options)
    stop.click(end, **quick)


def make_tell(event, of=1):
    """tell(i, done, total) for photograph i of `of`: moves the progress bar, and raises Stopped once `event` is set, as
    this does."""
    if event.is_set():
        raise jobs.Stopped
    progress, started = gr.Progress(), time.monotonic()

    def tell(i, done, total):
        if event.is_set():
            raise jobs.Stopped
        share = (i + done / total) / of
        left = (time.monotonic() - started) / share * (1 - share)
        name = f"photograph {i + 1} of {of}, " if of > 1 else ""
        progress(share, desc=f"{name}step {done} of {total}, about {left:.0f} s left")

    return tell


def about_lora(settings):
    """What a LoRA is made for, in a line of text."""
    lo, hi = settings["start_noise"]
    noise = f"{lo:g}" + (f" to {hi:g}" if lo < hi else "")
    side = f", {settings['resolution']} px" if settings["resolution"] else ""
    return f"Start noise {noise}{side}, prompt “{settings['prompt']}”"


def javascript(formula, least, most, served):
    """A function in JavaScript of a LoRA's name and a number: the formula of `value`, the number within least to most
    (an empty field counts as the least, as the page shows it too), and of lo and hi, the LoRA's start noise."""
    ranges = json.dumps({name: lora.settings["start_noise"] for name, lora in served.loras.items()})
    return f"""(name, number) => {{
        const [lo, hi] = {ranges}[name], value = Math.min(Math.max(number ?? {least}, {least}), {most});
        return Math.round(1e4 * ({formula})) / 1e4;
    }}"""


def settings_panel(page, served):
    """The settings, which all tabs share: components in the order of jobs.CONTROLS."""
    gr.Markdown("### Settings")
    lora = gr.Dropdown(list(served.loras), label="LoRA")
    preset = gr.Radio(jobs.PRESETS, value=jobs.PRESETS[0], label="Preset", info="Sets everything below")
    with gr.Accordion("All settings", open=False):
        fidelity = gr.Slider(0, 1, step=0.01, label="Fidelity", info="1: stays closest to the photograph; 0: invents "
                                                                     "most")
        start_noise = gr.Slider(0, 1, step=0.01, label="Start noise")
        most_steps = max(jobs.MAX_STEPS, *(choice.steps for choice in served.loras.values()))
        steps = gr.Slider(1, most_steps, step=1, precision=0, label="Steps")
        weight = gr.Slider(0, 2, step=0.05, label="LoRA weight", info="1: as trained; 0: off")
        shifts = gr.Radio([1, 2, 4, 8], label="Token shifts", info="The mean over so many token grids has no blocks; "
                                                                    "so many times slower")
        tile = gr.Dropdown([(f"{side} px" if int(side) else "whole picture", side) if side.isdecimal() else side
                            for side in dict.fromkeys((*TILES, served.args.tile))], label="Tile",
                           info="Larger pictures are restored piece by piece; auto: pieces as large as in training")
        color = gr.Radio(COLOR_FIXES, label="Colour fix", info="Colours from the photograph; off where colour is what "
                                                                "is damaged")
        seed = gr.Number(served.args.seed, precision=0, minimum=0, maximum=jobs.MAX_SEED, label="Seed of the noise")
    changed = [lora, fidelity, start_noise, steps, weight, shifts, tile, color]

    def apply(name, preset):
        settings, values = served.loras[name].settings, jobs.preset_values(served.args, served.loras[name], preset)
        lo, hi = settings["start_noise"]
        has_range = lo < hi
        sigmas = settings["train_sigmas"]
        most = len(sigmas) if isinstance(sigmas, list) and hi < 1 else jobs.MAX_STEPS
        return [
            gr.Dropdown(info=about_lora(settings)),
            gr.Slider(value=jobs.fidelity_of(settings, values["start_noise"]) if has_range else 1,
                      interactive=has_range),
            gr.Slider(value=values["start_noise"], minimum=lo if has_range else 0, maximum=hi if has_range else 1,
                      interactive=has_range,
                      info="The same on the scale of the training" if has_range else f"Trained at {lo:g} alone"),
            gr.Slider(value=values["num_inference_steps"], maximum=max(most, 2, served.loras[name].steps),
                      interactive=most > 1, info="More are slower" if most > 1 else "Trained for 1 alone"),
            *(values[name] for name in ("lora_weight", "token_shifts", "tile", "color_fix")),
        ]

    quick = {"queue": False, "show_progress": "hidden"}
    gr.on([lora.change, preset.change], apply, [lora, preset], changed, **quick)
    # In the browser: while a number is dragged or typed, answers of the server would come late, out of turn, or as
    # errors on what is half written.
    fidelity.input(None, [lora, fidelity], start_noise, js=javascript("hi - value * (hi - lo)", 0, 1, served))
    start_noise.input(None, [lora, start_noise], fidelity,
                      js=javascript("(hi - value) / (hi - lo)", "lo", "hi", served))
    page.load(apply, [lora, preset], changed, **quick)
    return [lora, steps, start_noise, weight, shifts, tile, color, seed]


def controls_of(values):
    if None in values:
        raise ValueError("A setting is empty; give it a value.")
    return dict(zip(jobs.CONTROLS, values, strict=True))


def photograph_input(served, label, elem_id):
    """(upload, its preview); a file that is no photograph is refused as soon as it is there."""
    upload = gr.File(label=label, file_types=sorted(EXTENSIONS), height=150, elem_id=elem_id,
                     elem_classes="dropzone")
    preview = gr.Image(label="Photograph", interactive=False, visible=False, buttons=[], height=220)

    def show(path):
        yield gr.Image(value=None, visible=False)  # nothing of an earlier upload stays, also where this one is refused
        if path is None:
            return
        with told_to_user():
            rgb = jobs.read_photograph(path, served.args.max_pixels).rgb
            yield gr.Image(value=jobs.to_show(rgb), visible=True, label=jobs.size_of(rgb))

    # Every upload is shown, in turn. Of those that come while an earlier one is read, "once" would show none, and
    # "always_last" none where the earlier one is refused.
    upload.change(show, upload, preview, trigger_mode="multiple", concurrency_limit=1, show_progress="hidden")
    return upload, preview


def example_gallery(paths):
    gr.Markdown("Or choose an example; its LoRA comes with it:")
    return gr.Gallery([str(path) for path in paths], show_label=False, columns=4, object_fit="cover",
                      allow_preview=False, interactive=False, buttons=[], elem_classes="examples")


def lora_of(example, served):
    """What an example makes of the choice of LoRA."""
    return example.lora if example.lora in served.loras else gr.skip()


def restore_tab(served, controls, examples, run_options):
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload, _ = photograph_input(served, "Drop a photograph here, or click", "photo")
            with gr.Row():
                run = gr.Button("Restore", variant="primary")
                stop = gr.Button("Stop")
            gallery = example_gallery([example.degraded for example in examples])
            file_format = gr.Dropdown(FORMATS, value="auto", label="Format of the result")
        with gr.Column(scale=3, min_width=320):
            slider = gr.ImageSlider(label="Before | after", format="png", interactive=False, buttons=["fullscreen"],
                                    max_height=640)
            done = gr.Markdown()
            download = gr.DownloadButton("Download the full-size result", interactive=False)
            with gr.Accordion("The same on the command line", open=False):
                command = gr.Textbox(show_label=False, container=False, lines=4, interactive=False, buttons=["copy"])

    def restore(event, path, ext, *values):
        tell = make_tell(event)
        if path is None:
            raise ValueError("Choose a photograph first.")
        output, = jobs.plan_job([path], jobs.new_folder(served.folder), ext)
        result = jobs.restore_file(served, controls_of(values), path, output, partial(tell, 0))
        return (
            (result.before, result.after),
            f"{result.size}, restored in {result.seconds:.1f} s",
            gr.DownloadButton(value=str(result.path), interactive=True),
            jobs.command_line(served, controls_of(values), Path(path).name, ext),
        )

    def choose(event: gr.SelectData):
        example = examples[event.index]
        return str(example.degraded), lora_of(example, served)

    gallery.select(choose, None, [upload, controls[0]], trigger_mode="multiple", queue=False, show_progress="hidden")
    start_and_stop(served, run, stop, restore, [upload, file_format, *controls], [slider, done, download, command],
                   slider, run_options)


def batch_tab(served, controls, run_options):
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            uploads = gr.File(label=f"Drop photographs here, up to {served.args.max_files}", file_count="multiple",
                              file_types=sorted(EXTENSIONS), height=200, elem_id="photos", elem_classes="dropzone")
            folder = gr.File(label="Or choose a folder", file_count="directory", height=150, elem_id="folder",
                             elem_classes="dropzone")
            with gr.Row():
                run = gr.Button("Restore all", variant="primary")
                stop = gr.Button("Stop")
            file_format = gr.Dropdown(FORMATS, value="auto", label="Format of the results")
        with gr.Column(scale=3, min_width=320):
            gallery = gr.Gallery(label="Restored", columns=4, height=360, format="png", interactive=False, buttons=[])
            table = gr.Dataframe(headers=["photograph", "size", "time", "result"], datatype="str", interactive=False,
                                 column_widths=["32%", "25%", "13%", "30%"], wrap=True, show_label=False)
            download = gr.DownloadButton("Download all as a ZIP file", interactive=False)

    def restore_all(event, files, folder, ext, *values):
        # A folder brings along what is no photograph: Thumbs.db, notes, hidden files.
        paths = [*(files or []), *(path for path in folder or [] if Path(path).suffix.lower() in EXTENSIONS
                                   and not Path(path).name.startswith("."))]
        if not 0 < len(paths) <= served.args.max_files:
            raise ValueError(f"Choose photographs first, up to {served.args.max_files}; there are {len(paths)}.")
        rows, archive = jobs.restore_files(served, controls_of(values), paths, ext, make_tell(event, len(paths)))
        lines, pictures = [], []
        for path, row in rows:
            name = Path(path).name
            if isinstance(row, ValueError):
                lines.append([name, "", "", f"failed: {str(row).removeprefix(f'{name}: ')}"])
                continue
            lines.append([name, row.size, f"{row.seconds:.1f} s", "restored"])
            pictures.append((row.after, row.path.name))
        lines += [[Path(path).name, "", "", "stopped before it"] for path in paths[len(rows):]]
        return pictures, lines, gr.DownloadButton(value=archive and str(archive), interactive=bool(archive))

    start_and_stop(served, run, stop, restore_all, [uploads, folder, file_format, *controls],
                   [gallery, table, download], gallery, run_options)


def score_tab(served, controls, examples, run_options):
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload, _ = photograph_input(served, "Drop a clean photograph here, or click", "clean")
            preset = gr.Dropdown(list(DEGRADATION_PRESETS), value="heavy", label="Damage")
            seed = gr.Number(0, precision=0, minimum=0, maximum=jobs.MAX_SEED, label="Seed of the damage")
            with gr.Row():
                run = gr.Button("Degrade and restore", variant="primary")
                stop = gr.Button("Stop")
            gallery = example_gallery([example.clean for example in examples])
        with gr.Column(scale=3, min_width=320):
            slider = gr.ImageSlider(label="Degraded | restored", format="png", interactive=False,
                                    buttons=["fullscreen"], max_height=480)
            table = gr.Dataframe(headers=["against the clean photograph", "PSNR (dB)", "SSIM"], datatype="str",
                                 interactive=False, show_label=False)
            clean = gr.ImageSlider(label="Restored | clean", format="png", interactive=False, buttons=["fullscreen"],
                                   max_height=480)
            done = gr.Markdown()
            download = gr.DownloadButton("Download the restored photograph", interactive=False)

    def degrade_and_restore(event, path, preset, damage_seed, *values):
        tell = make_tell(event)
        if path is None or damage_seed is None:
            raise ValueError("Choose a clean photograph and a seed first.")
        result, target, scores, params = jobs.score_file(served, controls_of(values), path, preset, damage_seed,
                                                         partial(tell, 0))
        damage = "; ".join(describe(step) for step in params) or "none was drawn"
        return (
            (result.before, result.after), (result.after, target),
            [[name, f"{score['psnr']:.2f}", f"{score['ssim']:.3f}"] for name, score in scores.items()],
            f"{result.size}, restored in {result.seconds:.1f} s. Damage: {damage}",
            gr.DownloadButton(value=str(result.path), interactive=True),
        )

    def choose(event: gr.SelectData):
        example = examples[event.index]
        return str(example.clean), example.damage, lora_of(example, served)

    gallery.select(choose, None, [upload, preset, controls[0]], trigger_mode="multiple", queue=False,
                   show_progress="hidden")
    start_and_stop(served, run, stop, degrade_and_restore, [upload, preset, seed, *controls],
                   [slider, clean, table, done, download], slider, run_options)


def launch(served, examples):
    """Build the page and serve it in a thread of its own. Returns the gradio.Blocks."""
    args = served.args
    run_options = {"concurrency_id": "model", "concurrency_limit": 1}  # one model, so one job at a time
    with gr.Blocks(title="Photo restoration", analytics_enabled=False,
                   delete_cache=(KEEP_UPLOADS_S, KEEP_UPLOADS_S)) as page:
        gr.Markdown(INTRO, elem_id="title")
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                controls = settings_panel(page, served)
            with gr.Column(scale=4, min_width=320):
                with gr.Tab("Restore"):
                    restore_tab(served, controls, examples, run_options)
                with gr.Tab("Many photographs"):
                    batch_tab(served, controls, run_options)
                with gr.Tab("Degrade and restore"):
                    score_tab(served, controls, examples, run_options)

        def leave(request: gr.Request):
            stop_jobs(served, request.session_hash)

        page.unload(leave)  # who closes the page does not keep others waiting

    theme = gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONO_FONTS).set(
        block_info_text_color="*neutral_500", body_text_color_subdued="*neutral_500")  # the defaults are hardly seen
    # This server's results and the examples are served by path, and Gradio's own copies of uploads; nothing else, not
    # even in --output.
    served_folders = [str(served.folder), str(Path(args.output, "examples"))]
    page.queue(max_size=args.queue_size)
    page.launch(
        server_name=f"[{args.host}]" if ":" in args.host else args.host, server_port=args.port or None, share=False,
        quiet=True, prevent_thread_lock=True, max_file_size=args.max_upload_mb * 2**20, allowed_paths=served_folders,
        footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, show_error=False, css=CSS,
        theme=theme)
    return page
