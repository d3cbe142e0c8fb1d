import httpx2
import pytest
from web4lora_chassis.errors import InvalidInput, Unauthenticated, Unavailable
from web4lora_deployer.registry.login import Credentials, Login, read_credentials


def answering(answer: httpx2.Response, asked: list[httpx2.Request]) -> httpx2.Client:
    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return answer

    return httpx2.Client(transport=httpx2.MockTransport(handle))


def test_a_secret_is_never_shown() -> None:
    credentials = Credentials("me", "sesame", "refresh")
    assert "sesame" not in repr(credentials)
    assert "refresh" not in repr(credentials)
    with pytest.raises(InvalidInput) as caught:
        read_credentials('{"password": "sesame", "more": 1}')
    assert "sesame" not in str(caught.value)


def test_a_password_is_not_sent_to_a_login_server_without_tls() -> None:
    asked: list[httpx2.Request] = []
    with answering(httpx2.Response(200, json={"token": "t"}), asked) as http:
        login = Login(Credentials("me", "sesame"), http, "a/b", plain_http=False)
        with pytest.raises(Unauthenticated, match="without TLS"):
            login.answer(['Bearer realm="http://login.example/token",service="s"'], "example.com")
    assert not asked


def test_a_token_to_push_with_is_asked_for_whatever_the_challenge_was_about() -> None:
    asked: list[httpx2.Request] = []
    with answering(httpx2.Response(200, json={"access_token": "t"}), asked) as http:
        login = Login(Credentials(), http, "a/b", plain_http=False)
        challenge = 'Bearer realm="https://login.example/token?a=1",service="s",scope="repository:a/b:pull"'
        login.answer(["Negotiate", challenge], "example.com")
    assert login.header == "Bearer t"
    (request,) = asked
    assert dict(request.url.params) == {"a": "1", "service": "s", "scope": "repository:a/b:pull,push"}
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("challenges", "status"), [(["Basic realm=x"], 200), ([], 200), (['Bearer realm="https://a/"'], 403)]
)
def test_what_can_t_be_answered_says_to_log_in(challenges: list[str], status: int) -> None:
    with answering(httpx2.Response(status, json={}), []) as http:
        login = Login(Credentials(), http, "a/b", plain_http=False)
        with pytest.raises(Unauthenticated) as caught:
            login.answer(challenges, "example.com")
    assert "docker login example.com" in caught.value.fix


def test_a_busy_login_server_is_no_wrong_password() -> None:
    with answering(httpx2.Response(429, headers={"Retry-After": "7"}), []) as http:
        login = Login(Credentials("me", "sesame"), http, "a/b", plain_http=False)
        with pytest.raises(Unavailable, match=r"login server of example\.com is busy") as caught:
            login.answer(['Bearer realm="https://a/"'], "example.com")
    assert caught.value.metadata["retry_after_seconds"] == "7.0"
