import httpx
import pytest
from web4lora_chassis.errors import InvalidInput, Unauthenticated
from web4lora_deployer.registry.login import Credentials, Login, read_credentials


def answering(answer: httpx.Response, asked: list[httpx.Request]) -> httpx.Client:
    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer

    return httpx.Client(transport=httpx.MockTransport(handle))


def test_a_secret_is_never_shown() -> None:
    credentials = Credentials("me", "sesame", "refresh")
    assert "sesame" not in repr(credentials)
    assert "refresh" not in repr(credentials)
    with pytest.raises(InvalidInput) as caught:
        read_credentials('{"password": "sesame", "more": 1}')
    assert "sesame" not in str(caught.value)


def test_a_password_is_not_sent_to_a_login_server_without_tls() -> None:
    asked: list[httpx.Request] = []
    with answering(httpx.Response(200, json={"token": "t"}), asked) as http:
        login = Login(Credentials("me", "sesame"), http, plain_http=False)
        with pytest.raises(Unauthenticated, match="without TLS"):
            login.answer(['Bearer realm="http://login.example/token",service="s"'], "example.com")
    assert not asked


def test_the_challenge_s_service_and_scope_are_asked_for() -> None:
    asked: list[httpx.Request] = []
    with answering(httpx.Response(200, json={"access_token": "t"}), asked) as http:
        login = Login(Credentials(), http, plain_http=False)
        challenge = (
            'Bearer realm="https://login.example/token?a=1",service="s",scope="repository:a/b:pull,push"'
        )
        login.answer(["Negotiate", challenge], "example.com")
    assert login.header == "Bearer t"
    (request,) = asked
    assert dict(request.url.params) == {"a": "1", "service": "s", "scope": "repository:a/b:pull,push"}
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("challenges", "status"), [(["Basic realm=x"], 200), ([], 200), (['Bearer realm="https://a/"'], 403)]
)
def test_what_can_t_be_answered_says_to_log_in(challenges: list[str], status: int) -> None:
    with answering(httpx.Response(status, json={}), []) as http:
        login = Login(Credentials(), http, plain_http=False)
        with pytest.raises(Unauthenticated) as caught:
            login.answer(challenges, "example.com")
    assert "docker login example.com" in caught.value.fix
