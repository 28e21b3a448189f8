"""What the rows of the policy table do in a guest, as root. Each attempt gives `open: ...` or `refused: ...`."""

import fcntl
import os
import socket
import struct
import time

ASK = b"GET /whoami HTTP/1.0\r\n\r\n"
# ICMP's type.
UNREACHABLE = 3


def outcome(work, *arguments):
    try:
        return f"open: {work(*arguments)}"
    except OSError as error:
        return "refused: " + (error.strerror or str(error) or type(error).__name__)


def resolve(name):
    """All IPv4 addresses of it."""
    return sorted({found[4][0] for found in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)})


def last_line(data):
    if not data:
        raise OSError("closed without a word")
    return data.decode(errors="replace").split("\n")[-2].strip() or f"{len(data)} bytes"


def exchange(stream, data):
    stream.settimeout(3)
    stream.sendall(data)
    return stream.recv(4096)


def tcp(host, port, family=socket.AF_INET):
    """Connects, to the first address of a name, and asks who we are; an echo sends the question back."""

    def work():
        with socket.socket(family) as stream:
            stream.settimeout(3)
            stream.connect((host, port))
            return last_line(exchange(stream, ASK))

    return outcome(work)


def each(name, port):
    """Connects to every address of a name: open when any answers."""

    def work():
        said = [tcp(address, port) for address in resolve(name)]
        if not any(one.startswith("open") for one in said):
            raise OSError(", ".join(said))
        return said

    return outcome(work)


def udp(host, port, data=b"hello\n", broadcast=False):
    def work():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(2)
            if broadcast:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            # Connected, it hears of an ICMP refusal.
            s.connect((host, port))
            s.send(data)
            return f"{len(s.recv(65536))} bytes"

    return outcome(work)


def dns(server, name, kind=1, stream=False):
    """Asks a nameserver without the help of libc. Kinds: 1 A, 16 TXT, 28 AAAA."""

    def work():
        labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
        question = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as s:
            s.settimeout(3)
            s.connect((server, 53))
            if stream:
                answer = exchange(s, struct.pack("!H", len(question)) + question)[2:]
            else:
                answer = exchange(s, question)
        if len(answer) < 12:
            raise OSError("closed without a word")
        _, flags, _, answers = struct.unpack_from("!HHHH", answer)
        if flags & 15 or not answers:
            raise OSError(f"code {flags & 15}, {answers} answers")
        return f"{answers} answers"

    return outcome(work)


def own_address():
    with socket.socket() as s:
        return socket.inet_ntoa(fcntl.ioctl(s, 0x8915, struct.pack("256s", b"eth0"))[20:24])


def gateway():
    for line in open("/proc/net/route").read().split("\n")[1:]:
        words = line.split()
        if words and words[1] == "00000000":
            return socket.inet_ntoa(struct.pack("<I", int(words[2], 16)))
    raise OSError("there is no default route")


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip(to, protocol, body, source=None, fragment=0, options=b""):
    words = (20 + len(options)) // 4
    ends = socket.inet_aton(source or own_address()), socket.inet_aton(to)
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, 4 * words + len(body), 7, fragment, 64, protocol, 0, *ends)
    head += options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def syn(to, port, source=None, **more):
    """A packet that asks for a connection."""
    head = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, 2, 64000, 0, 0)
    ends = socket.inet_aton(source or own_address()) + socket.inet_aton(to)
    sum = checksum(ends + struct.pack("!BBH", 0, 6, len(head)) + head)
    return ip(to, 6, head[:16] + struct.pack("!H", sum) + head[18:], source, **more)


def datagram(to, port, source=None, data=b"hello\n", **more):
    return ip(to, 17, struct.pack("!HHHH", 40000, port, 8 + len(data), 0) + data, source, **more)


def packet(data, wait=1.0):
    """Sends a packet as it is by the gateway, past the own routes, and looks for what comes back from where it went."""

    def work():
        to = socket.inet_ntoa(data[16:20])
        with (
            socket.socket(socket.AF_INET, socket.SOCK_RAW, data[9]) as back,
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out,
        ):
            out.sendto(data, (gateway(), 0))
            end = time.monotonic() + wait
            while (left := end - time.monotonic()) > 0:
                back.settimeout(left)
                answer, sender = back.recvfrom(65536)
                if sender[0] != to:
                    continue
                # Of TCP, only what accepts is an answer.
                if data[9] == socket.IPPROTO_TCP and answer[33] & 0x12 != 0x12:
                    raise OSError("reset")
                return f"{len(answer)} bytes"
        raise OSError("no answer")

    return outcome(work)


def disguised(mac, attempt, *arguments):
    """Does something with another Ethernet address."""
    own = open("/sys/class/net/eth0/address").read().strip()
    change = "R=$(ip route show default); ip link set eth0 down; ip link set eth0 address {}; ip link set eth0 up; " \
        "ip route add $R"
    if os.system(change.format(mac)):
        return "the address cannot be changed"
    try:
        return attempt(*arguments)
    finally:
        os.system(change.format(own))


def echo_request(to):
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"hello"
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def raw(to, protocol, body):
    """Another protocol than TCP and UDP, by a raw socket."""

    def work():
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as s:
            s.settimeout(1)
            s.sendto(body, (to, 0))
            while True:
                data, sender = s.recvfrom(4096)
                if protocol == 1 and data[20] == UNREACHABLE:
                    raise OSError("unreachable")
                if sender[0] == to:
                    return f"{len(data)} bytes"

    return outcome(work)


def version6(to, port):
    """A datagram in a version 6 packet, which the guest's own kernel does not know."""
    body = struct.pack("!HHHH", 40000, port, 14, 0) + b"hello\n"
    ends = socket.inet_pton(socket.AF_INET6, "fe80::7") + socket.inet_pton(socket.AF_INET6, to)
    return struct.pack("!IHBB", 6 << 28, len(body), 17, 64) + ends + body


def large(host, port, mtu=9000):
    """A datagram in one frame that is longer than Ethernet's."""
    run = lambda size: os.system(f"ip link set eth0 mtu {size}")
    run(mtu)
    try:
        return udp(host, port, b"x" * (mtu - 100))
    finally:
        run(1500)


def after(seconds, attempt, *arguments):
    time.sleep(seconds)
    return attempt(*arguments)
