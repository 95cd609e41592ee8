"""Images that a task names are attached as providers take them; whatever else it names is text."""

import base64
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agent_fsm import AgentConfig, ConfigError, EchoMCP, run_agent
from agent_fsm.images import LONG_EDGE_PIXELS, MAX_IMAGE_CHARS, MAX_TOTAL_CHARS, with_images
from agent_fsm.messages import PART_TOKENS, message_size
from agent_fsm.testing import ScriptedModel, openai_faults
from tests.openai_server import OpenAIServer

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "my blue (1).png")
    return tmp_path


def parts(text: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """What *text* becomes after itself."""
    (message,) = with_images([{"role": "user", "content": text}], root=folder, **options)
    if isinstance(message["content"], str):
        assert message == {"role": "user", "content": text}
        return []
    first: dict[str, Any]
    rest: list[dict[str, Any]]
    first, *rest = message["content"]
    assert first == {"type": "text", "text": text}
    return rest


def urls(text: str, folder: Path, **options: Any) -> list[str]:
    return [part["image_url"]["url"] for part in parts(text, folder, **options) if part["type"] == "image_url"]


def notes(text: str, folder: Path, **options: Any) -> str:
    return "\n".join(part["text"] for part in parts(text, folder, **options) if part["type"] == "text")


def shown(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format is not None and image.format.lower() in head
    return image


def colour(url: str) -> Any:
    return shown(url).convert("RGB").getpixel((0, 0))


RED, BLUE = (255, 0, 0), (0, 0, 255)


# What names an image

NAMED = [
    ("Look at red.png", [RED]),
    ("Look at red.png.", [RED]),
    ("(red.png), please", [RED]),
    ("**red.png**: what is it?", [RED]),
    ("`./red.png` and 'red.png' are one", [RED]),
    ("RED.PNG is no file here", []),
    ("![what it shows](red.png)", [RED]),
    ('"my blue (1).png" and red.png', [BLUE, RED]),
    ("red.png, then 'my blue (1).png'", [RED, BLUE]),
    ("don't forget 'my blue (1).png'", [BLUE]),
    ("![blue](my blue (1).png)", [BLUE]),
    ("my\\ blue\\ (1).png", [BLUE]),
    ("my blue (1).png", []),
    ("\u8bf7\u770b\u300cred.png\u300d\u3002", []),
    ("\u300cred.png\u300d", [RED]),
    ("file://{folder}/my%20blue%20(1).png", [BLUE]),
    ("file://localhost{folder}/red.png", [RED]),
    ("file://elsewhere{folder}/red.png", []),
    ("{folder}/red.png", [RED]),
    ("nothing.png, red.txt, .png, ~nobody-at-all/red.png, \0.png, \ud800.png", []),
    ("There is none in here.", []),
]


@pytest.mark.parametrize(("text", "colours"), NAMED, ids=[text for text, _ in NAMED])
def test_a_path_is_found_however_it_is_written(folder: Path, text: str, colours: list[Any]) -> None:
    assert [colour(url) for url in urls(text.format(folder=folder), folder)] == colours


def test_a_word_of_a_quoted_name_is_no_name_of_its_own(folder: Path) -> None:
    (folder / "blue.png").write_bytes((folder / "my blue (1).png").read_bytes())
    (folder / "a blue.png").write_bytes((folder / "red.png").read_bytes())

    assert [colour(url) for url in urls("see 'a blue.png'", folder)] == [RED]


def test_without_a_root_paths_begin_where_the_process_is(folder: Path) -> None:
    program = (
        "from agent_fsm.images import with_images;"
        "print(len(with_images([{'role': 'user', 'content': 'red.png ~/red.png'}])[0]['content']))"
    )
    environ = os.environ | {"HOME": str(folder), "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (ran.stdout.strip(), ran.stderr) == ("2", "")  # the text, and the one image that both are


URLS = [
    ("https://example.org/a.png", ["https://example.org/a.png"]),
    ("see (http://example.org/b.jpg?size=1).", ["http://example.org/b.jpg?size=1"]),
    ("![c](https://example.org/c.webp) <https://example.org/d.GIF>", ["https://example.org/c.webp", "https://example.org/d.GIF"]),
    ("https://example.org/a.png https://example.org/a.png", ["https://example.org/a.png"]),
    ("https://b.org/b.png;https://a.org/a.png", ["https://b.org/b.png", "https://a.org/a.png"]),
    ("https://example.org/a.html ftp://example.org/a.png example.org/a.png", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "found"), URLS, ids=[text for text, _ in URLS])
def test_a_url_is_passed_on_as_it_is(folder: Path, text: str, found: list[str]) -> None:
    assert urls(text, folder) == found


def test_finding_urls_asks_no_network_and_leaves_no_file(tmp_path: Path) -> None:
    program = """
import os, sys
opened = []
def audit(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__": opened.append((event, arguments))
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        opened.append((event, arguments[0]))
sys.dont_write_bytecode = True
sys.addaudithook(audit)
from agent_fsm.images import with_images
print(with_images([{"role": "user", "content": "https://example.org/a.png"}])[0]["content"][1]["image_url"]["url"])
print([each for each in opened if not str(each[1]).startswith(sys.argv[1])])
print(os.listdir(sys.argv[1]))
"""
    environ = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert (ran.stdout.splitlines(), ran.stderr) == (["https://example.org/a.png", "[]", "[]"], "")


# What is not attached


def test_messages_without_images_and_of_others_are_left_as_they_are(folder: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "red.png"},
        {"role": "user", "content": [{"type": "text", "text": "red.png"}]},
        {"role": "assistant", "content": "red.png"},
        {"role": "user", "content": "no image"},
    ]

    assert with_images(messages, root=folder) == messages


def test_nothing_outside_the_root_is_read_even_over_a_link(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(folder / "red.png")
    (inner / "own.png").write_bytes((folder / "red.png").read_bytes())

    assert parts(f"../red.png {folder}/red.png link.png ~/red.png", inner) == []
    assert [colour(url) for url in urls("../inner/own.png", inner)] == [RED]


def test_directories_pipes_and_devices_are_text(folder: Path) -> None:
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")

    assert parts("folder.png pipe.png zero.png", folder) == []


BROKEN = [
    (b"", "no image that can be read"),
    (b"just text", "no image that can be read"),
    (b"\x89PNG\r\n\x1a\n", "no image that can be read"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image that can be read"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image that can be read"),
]


@pytest.mark.parametrize(("data", "told"), BROKEN)
def test_a_broken_image_is_told_of_beside_those_that_are_attached(folder: Path, data: bytes, told: str) -> None:
    (folder / "bad.png").write_bytes(data)

    images, note = urls("bad.png red.png", folder), notes("bad.png red.png", folder)

    assert [colour(url) for url in images] == [RED]
    assert note.startswith("[bad.png is not attached: it is ") and told in note


def test_a_cut_off_image_is_told_of(folder: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(whole, format="JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:-2000])

    assert "cut.jpg is not attached: it is no image that can be read" in notes("cut.jpg", folder)


@pytest.mark.parametrize("size", [(15_000, 15_000), (9_000, 9_000)])
def test_an_image_that_unpacks_to_too_much_is_not_unpacked(folder: Path, size: tuple[int, int]) -> None:
    Image.new("1", size).save(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 100_000

    assert "pixels" in notes("bomb.png", folder)


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    with (folder / "large.png").open("wb") as file:
        file.truncate(50_000_001)

    assert notes("large.png", folder) == "[large.png is not attached: it has more than 50,000,000 bytes]"


def test_images_beyond_the_most_are_told_of_once(folder: Path) -> None:
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        (folder / name).write_bytes((folder / "red.png").read_bytes())

    rest = parts(" ".join(names), folder, max_images=2)

    assert [part["type"] for part in rest] == ["image_url", "image_url", "text"]
    assert rest[-1]["text"] == "[3 more of the images are not attached: there are as many as may be]"
    assert len(parts(" ".join(names), folder, max_images=5)) == 5


def test_a_text_full_of_names_is_read_in_bounded_time(folder: Path) -> None:
    began = time.monotonic()
    for text in (
        "(" * 300_000,
        '.png"' * 60_000,
        "http://" * 50_000,
        "https://a.com/a.png," * 20_000,
        "a.png " * 50_000,
    ):
        assert parts(text, folder) == []

    assert time.monotonic() - began < 10.0  # 1 s on an idle machine; in the square of their lengths it would be hours


# How images look


def test_a_long_image_is_scaled_to_the_long_edge_and_keeps_its_shape(folder: Path) -> None:
    Image.new("RGB", (4_000, 1_000)).save(folder / "wide.png")
    Image.new("RGB", (500, 2_000)).save(folder / "tall.jpg")
    Image.new("RGB", (LONG_EDGE_PIXELS, 10)).save(folder / "just.png")

    sizes = [shown(url).size for url in urls("wide.png tall.jpg just.png red.png", folder)]

    assert sizes == [(1568, 392), (392, 1568), (1568, 10), (30, 20)]


def noise(mode: str, edge: int) -> Image.Image:
    data = random.Random(1).randbytes(len(mode) * edge * edge)
    return Image.frombytes(mode, (edge, edge), data)


def test_every_image_comes_to_less_than_the_providers_take(folder: Path) -> None:
    noise("RGBA", LONG_EDGE_PIXELS).save(folder / "noise.png", compress_level=0)

    (url,) = urls("noise.png", folder)

    assert len(url) < MAX_IMAGE_CHARS < (folder / "noise.png").stat().st_size
    assert shown(url).size == (LONG_EDGE_PIXELS, LONG_EDGE_PIXELS)


def test_images_come_to_less_than_a_request_may_hold_together(folder: Path) -> None:
    for number in range(5):
        noise("RGB", 1_100).save(folder / f"{number}.png", compress_level=0)
    text = "0.png 1.png 2.png 3.png 4.png red.png"

    rest = parts(text, folder)

    assert [part["type"] for part in rest] == ["image_url"] * 5 + ["text"]
    assert 15_000_000 < sum(len(part["image_url"]["url"]) for part in rest[:-1]) <= MAX_TOTAL_CHARS
    assert rest[-1]["text"] == "[4.png is not attached: the images before it are as large as may be together]"


def test_a_photo_is_upright_and_without_what_its_camera_wrote(folder: Path) -> None:
    photo = Image.new("RGB", (60, 20), "red")
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "a camera of mine"
    photo.save(folder / "photo.jpg", exif=exif, comment=b"at home")

    (url,) = urls("photo.jpg", folder)

    assert shown(url).size == (20, 60)
    data = base64.b64decode(url.partition(",")[2])
    assert b"camera" not in data and b"home" not in data
    assert b"camera" in (folder / "photo.jpg").read_bytes()


def test_of_an_animation_the_first_picture_is_sent(folder: Path) -> None:
    frames = [Image.new("RGB", (20, 20), name) for name in ("red", "blue")]
    for name in ("moving.gif", "moving.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], lossless=True)

    images = urls("moving.gif moving.webp", folder)

    assert [getattr(shown(url), "n_frames", 1) for url in images] == [1, 1]
    for url in images:
        assert colour(url) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_is_taken(folder: Path, mode: str) -> None:
    half = 30_000 if mode == "I;16" else 0
    name = "image.jpg" if mode == "CMYK" else "image.png"
    Image.new(mode, (20, 20), half).save(folder / name)

    (url,) = urls(name, folder)

    assert shown(url).mode in ("L", "RGB", "RGBA")
    if mode == "I;16":
        assert colour(url) == (117, 117, 117)


# Settings


@pytest.mark.parametrize("number", [0, -1, True, 1.5])
def test_a_count_that_can_mean_nothing_is_refused(folder: Path, number: Any) -> None:
    with pytest.raises(ConfigError, match="max_images must be a whole number >= 1"):
        with_images([], root=folder, max_images=number)


def test_a_root_that_is_no_directory_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="root must be a directory"):
        with_images([], root=folder / "red.png")


def test_a_missing_package_is_told_with_what_installs_it(folder: Path) -> None:
    program = """
import sys
sys.modules["PIL"] = None
from agent_fsm.images import with_images
try:
    with_images([{"role": "user", "content": "red.png"}])
except ValueError as error:
    print(type(error).__name__, error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ran.stdout.startswith("ConfigError images in messages need PIL")
    assert "pip install 'agent-fsm[images]'" in ran.stdout


# Runs


def test_an_image_counts_as_an_image_and_not_as_its_base64(folder: Path) -> None:
    Image.effect_noise((1_200, 1_200), 100).save(folder / "noise.png")

    (message,) = with_images([{"role": "user", "content": "noise.png"}], root=folder)

    assert len(str(message)) > 1_000_000
    assert PART_TOKENS <= message_size(message) < PART_TOKENS + 200


def test_a_run_sends_its_images_with_every_request(folder: Path) -> None:
    messages = with_images([{"role": "user", "content": "Say what red.png shows."}], root=folder)
    model = ScriptedModel([[("echo", {"text": "red"})], "Red."], usage=(900, 3))

    result = run_agent(messages, EchoMCP(), AgentConfig(), model_client=model)

    assert (result.final_answer, result.stopped_reason) == ("Red.", "success")
    assert [request.messages[0] for request in model.requests] == messages * 2
    assert not openai_faults(model.requests[1].messages)


def test_a_run_through_litellm_sends_the_parts_as_they_are(folder: Path) -> None:
    text = "Say what red.png and https://example.org/a.png show."
    messages = with_images([{"role": "user", "content": text}], root=folder)
    with OpenAIServer([[("echo", {"text": "red"})], "Red."]) as server:
        config = AgentConfig(model="openai/gpt-4o-mini", completion_kwargs=server.completion_kwargs)
        result = run_agent(messages, EchoMCP(), config)

    assert (result.final_answer, result.stopped_reason) == ("Red.", "success")
    sent = server.requests[1].body["messages"][0]["content"]
    assert [part["type"] for part in sent] == ["text", "image_url", "image_url"]
    assert [part["image_url"]["url"] for part in sent[1:]] == [
        part["image_url"]["url"] for part in messages[0]["content"][1:]
    ]


def test_a_summary_of_the_conversation_tells_of_images_without_their_data(folder: Path) -> None:
    messages = with_images([{"role": "user", "content": "Say what red.png shows."}], root=folder)
    model = ScriptedModel([[("echo", {"text": "red"})], "It was red.", "Red."])

    result = run_agent(messages, EchoMCP(), AgentConfig(summarize_every=1), model_client=model)

    assert result.stopped_reason == "success"
    assert "[image_url]" in str(model.requests[1].messages)
    assert "base64" not in str(model.requests[1].messages)
