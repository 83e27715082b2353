"""The chat page of the service in headless Chromium: streaming, stop, history, languages, key."""

import json
import time

import pytest
from helpers.browser import browser, required
from helpers.scripted_model import IM_END, scripted_model
from helpers.serving import running_server

pytestmark = [required, pytest.mark.slow]
WORDS = ["7", "8", "5"]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def element(driver, name):
    return driver.find_element("id", name)


def ask(driver, text):
    element(driver, "question").send_keys(text)
    element(driver, "send").click()


def messages(driver):
    return [item.text for item in driver.find_elements("css selector", ".message span")]


def stored(driver):
    return json.loads(driver.execute_script("return localStorage.getItem('internlm-chat')"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that says 7, 8, 5 and then 9 for ever."""
    return scripted_model(tmp_path_factory.mktemp("model") / "hf", WORDS, "9", special=(IM_END,))


def test_the_page(model, tmp_path):
    key = "a key"
    flags = [
        "--served-model-name",
        "tiny",
        "--cache-memory",
        "0.02",
        "--api-key",
        key,
        "--chat-template",
        "v1",
    ]
    with (
        running_server(model, tmp_path / "logs", *flags) as server,
        browser(tmp_path / "a", "zh-CN") as driver,
    ):
        driver.get(server.url)
        assert element(driver, "send").text == "发送"
        assert driver.execute_script("return document.documentElement.lang") == "zh-CN"
        ask(driver, "你好")
        wait_for(lambda: "the API key is missing or wrong" in messages(driver))
        assert element(driver, "question").get_attribute("value") == "你好"  # it is not lost
        element(driver, "key").send_keys(key, "\n")
        element(driver, "question").clear()
        wait_for(lambda: element(driver, "model").text == "tiny")
        element(driver, "temperature").clear()
        element(driver, "temperature").send_keys("0")
        element(driver, "limit").send_keys("6")
        element(driver, "system").send_keys("Answer in one word.")
        ask(driver, "<b>你好</b>")
        wait_for(lambda: "生成 6 个" in element(driver, "status").text)
        assert messages(driver)[-2:] == ["<b>你好</b>", "785999"]  # text, not markup
        driver.save_screenshot(str(tmp_path / "zh.png"))
        element(driver, "language").click()
        assert element(driver, "send").text == "Send"
        assert "Model" in element(driver, "messages").text

        element(driver, "limit").clear()
        ask(driver, "and on?")
        wait_for(lambda: messages(driver)[-1].startswith("785999"))
        driver.save_screenshot(str(tmp_path / "en.png"))
        element(driver, "stop").click()
        wait_for(lambda: element(driver, "status").text == "stopped")
        headers = {"Authorization": f"Bearer {key}"}
        wait_for(lambda: server.metric("num_requests_running", headers) == 0)
        assert server.metric("kv_cache_usage_perc", headers) == 0
        (conversation,) = stored(driver)["conversations"]
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * 2
        assert 6 < len(conversation["messages"][3]["content"]) < 900

        element(driver, "new").click()
        assert messages(driver) == []
        element(driver, "limit").send_keys("2")
        ask(driver, "another")
        wait_for(lambda: messages(driver)[-1:] == ["78"] and element(driver, "send").is_displayed())
        driver.refresh()  # history and language stay, the key does not
        assert messages(driver) == ["another", "78"]
        assert element(driver, "send").text == "Send"
        assert element(driver, "key").get_attribute("value") == ""
        driver.find_elements("css selector", "#history li button:first-child")[1].click()
        assert messages(driver)[:2] == ["<b>你好</b>", "785999"]
        driver.save_screenshot(str(tmp_path / "history.png"))
        driver.find_elements("css selector", "#history li button:last-child")[1].click()
        assert messages(driver) == ["another", "78"]
        errors = [item["message"] for item in driver.get_log("browser") if item["level"] == "SEVERE"]
        assert [text for text in errors if "401" not in text and "favicon" not in text] == []


def test_the_language_of_the_browser(model, tmp_path):
    server_of = running_server(model, tmp_path / "logs", "--cache-memory", "0.02")
    with server_of as server, browser(tmp_path / "profile", "en-US") as driver:
        driver.get(server.url)
        assert element(driver, "send").text == "Send"
        assert element(driver, "language").text == "中文"
