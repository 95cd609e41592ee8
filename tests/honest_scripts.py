"""Programs that anybody could write, with nothing but the standard library; each prints "ok" and exits 0.

They are the other half of every attack: containment that breaks them is worth nothing.
"""

from textwrap import dedent

__all__ = ["SCRIPTS"]

_SOURCES = {
    "json": "import json; assert json.loads(json.dumps({'a': [1, 2.5, None, 'é']}))['a'][3] == 'é'",
    "csv": """
        import csv
        with open('t.csv', 'w', newline='') as file: csv.writer(file).writerows([['a', 'b'], [1, 'x,y']])
        with open('t.csv', newline='') as file: assert list(csv.reader(file))[1] == ['1', 'x,y']
        """,
    "sqlite3_memory": "import sqlite3; assert sqlite3.connect(':memory:').execute('select 6 * 7').fetchone() == (42,)",
    "sqlite3_file_with_wal": """
        import sqlite3
        with sqlite3.connect('data.db') as database:
            assert database.execute('pragma journal_mode=wal').fetchone() == ('wal',)
            database.execute('create table t (n int)')
            database.executemany('insert into t values (?)', [(n,) for n in range(1000)])
        assert sqlite3.connect('data.db').execute('select sum(n) from t').fetchone() == (499500,)
        """,
    "tempfile": """
        import os, tempfile
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b'x' * 100_000); file.flush()
            assert os.path.getsize(file.name) == 100_000
        assert not os.path.exists(folder)
        with tempfile.TemporaryFile() as file: file.write(b'x'); file.seek(0); assert file.read() == b'x'
        """,
    "subprocess": """
        import subprocess, sys
        done = subprocess.run([sys.executable, '-S', '-c', 'print(6 * 7)'], capture_output=True, text=True, check=True)
        assert done.stdout == '42\\n', done
        """,
    "subprocess_shell_pipe": """
        import subprocess
        done = subprocess.run('printf "b\\na\\n" | sort | head -n 1', shell=True, capture_output=True, text=True)
        assert done.stdout == 'a\\n', done
        """,
    "subprocess_timeout": """
        import subprocess
        try: subprocess.run(['sleep', '30'], timeout=0.2)
        except subprocess.TimeoutExpired: pass
        else: raise AssertionError
        """,
    "subprocess_exit_codes": """
        import subprocess
        assert subprocess.run(['sh', '-c', 'exit 7']).returncode == 7
        assert subprocess.run(['sh', '-c', 'kill -TERM $$']).returncode == -15
        """,
    "subprocess_input": """
        import subprocess
        assert subprocess.run(['cat'], input=b'x' * 1_000_000, capture_output=True).stdout == b'x' * 1_000_000
        """,
    "multiprocessing_pool": """
        import multiprocessing
        def square(n): return n * n
        if __name__ == '__main__':
            with multiprocessing.Pool(2) as pool: assert pool.map(square, range(20)) == [n * n for n in range(20)]
        """,
    "multiprocessing_spawn_queue": """
        import multiprocessing
        def put(queue): queue.put('hello')
        if __name__ == '__main__':
            context = multiprocessing.get_context('spawn')
            queue = context.Queue()
            process = context.Process(target=put, args=(queue,)); process.start()
            assert queue.get(timeout=20) == 'hello'; process.join()
        """,
    "multiprocessing_shared_memory": """
        from multiprocessing import shared_memory
        memory = shared_memory.SharedMemory(create=True, size=4096)
        memory.buf[:2] = b'hi'
        other = shared_memory.SharedMemory(memory.name); assert bytes(other.buf[:2]) == b'hi'
        other.close(); memory.close(); memory.unlink()
        """,
    "process_pool_executor": """
        from concurrent.futures import ProcessPoolExecutor
        if __name__ == '__main__':
            with ProcessPoolExecutor(2) as pool: assert list(pool.map(abs, [-1, -2])) == [1, 2]
        """,
    "threads": """
        import threading
        lock, found = threading.Lock(), []
        def work(n):
            with lock: found.append(n)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(40)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert sorted(found) == list(range(40))
        """,
    "threads_at_once": """
        import threading
        barrier = threading.Barrier(40)
        threads = [threading.Thread(target=barrier.wait, args=(20,)) for n in range(40)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not barrier.broken
        """,
    "thread_pool_executor": """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool: assert sum(pool.map(lambda n: n, range(100))) == 4950
        """,
    "ssl": """
        import ssl
        context = ssl.create_default_context()
        assert context.check_hostname and ssl.RAND_bytes(8) and len(context.get_ciphers()) > 3
        """,
    "hashlib_hmac_secrets": """
        import hashlib, hmac, secrets
        assert hashlib.sha256(b'').hexdigest().startswith('e3b0c442')
        assert hmac.new(b'k', b'm', 'sha256').digest() and len(secrets.token_hex(8)) == 16
        assert hashlib.scrypt(b'p', salt=b's', n=16, r=8, p=1)
        """,
    "zoneinfo": """
        import datetime, zoneinfo
        noon = datetime.datetime(2026, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo('Europe/Berlin'))
        assert noon.astimezone(datetime.timezone.utc).hour == 10
        """,
    "time": """
        import time
        start = time.monotonic(); time.sleep(0.01); assert time.monotonic() > start
        assert time.localtime().tm_year > 2000 and time.process_time() > 0 and time.strftime('%Z')
        """,
    "ctypes": """
        import ctypes, ctypes.util
        assert ctypes.CDLL(None).abs(-3) == 3
        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
        def double(n): return 2 * n
        assert double(21) == 42
        """,
    "asyncio": """
        import asyncio
        async def main():
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                tasks = [group.create_task(asyncio.sleep(0.01, n)) for n in range(10)]
            assert [task.result() for task in tasks] == list(range(10))
            assert await asyncio.to_thread(sum, [1, 2]) == 3
        asyncio.run(main())
        """,
    "asyncio_subprocess": """
        import asyncio
        async def main():
            process = await asyncio.create_subprocess_exec('echo', 'hi', stdout=asyncio.subprocess.PIPE)
            out, _ = await process.communicate()
            assert out == b'hi\\n' and process.returncode == 0
        asyncio.run(main())
        """,
    "asyncio_server": """
        import asyncio
        async def answer(reader, writer):
            writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
        async def main():
            server = await asyncio.start_server(answer, '127.0.0.1', 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b'hello\\n')
            assert await reader.readline() == b'HELLO\\n'
            writer.close(); server.close()
        asyncio.run(main())
        """,
    "http_server": """
        import http.server, threading, urllib.request
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'hello')
            def log_message(self, *arguments): pass
        server = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert urllib.request.urlopen(f'http://localhost:{server.server_port}/', timeout=20).read() == b'hello'
        server.shutdown()
        """,
    "unix_sockets": """
        import os, socket
        server = socket.socket(socket.AF_UNIX); server.bind('s.sock'); server.listen()
        client = socket.socket(socket.AF_UNIX); client.connect('s.sock')
        client.sendall(b'hi'); assert server.accept()[0].recv(2) == b'hi'
        one, two = socket.socketpair(); one.send(b'x'); assert two.recv(1) == b'x'
        """,
    "udp_on_loopback": """
        import socket
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(('127.0.0.1', 0)); one.settimeout(20)
        two = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); two.sendto(b'hi', one.getsockname())
        assert one.recv(2) == b'hi'
        """,
    "selectors_and_pipes": """
        import os, selectors
        read, write = os.pipe()
        with selectors.DefaultSelector() as selector:
            selector.register(read, selectors.EVENT_READ); os.write(write, b'x')
            assert selector.select(20)[0][0].fd == read
        """,
    "unicode_output": """
        import sys
        assert sys.stdout.encoding == 'utf-8'
        open('naïve-☃.txt', 'w').write('日本語')
        import os
        assert 'naïve-☃.txt' in os.listdir('.') and open('naïve-☃.txt').read() == '日本語'
        """,
    "own_modules": """
        import pathlib
        pathlib.Path('helpers').mkdir()
        pathlib.Path('helpers/__init__.py').write_text('from helpers.numbers import ANSWER')
        pathlib.Path('helpers/numbers.py').write_text('ANSWER = 42')
        import helpers
        assert helpers.ANSWER == 42
        """,
    "big_files": """
        import os
        with open('big', 'wb') as file:
            for _ in range(40): file.write(b'x' * 2**20)
        assert os.path.getsize('big') == 40 * 2**20
        os.unlink('big')
        """,
    "a_thousand_files": """
        import pathlib
        for n in range(1000): pathlib.Path(f'f{n}').write_text('x')
        assert len(list(pathlib.Path().glob('f*'))) == 1000
        """,
    "signals_among_own_processes": """
        import os, signal, subprocess, time
        process = subprocess.Popen(['sleep', '30']); process.terminate(); assert process.wait(20) == -15
        process = subprocess.Popen(['sleep', '30'], start_new_session=True)
        os.killpg(process.pid, signal.SIGKILL); assert process.wait(20) == -9
        """,
    "signal_handlers": """
        import os, signal
        seen = []
        signal.signal(signal.SIGUSR1, lambda *_: seen.append('usr1')); os.kill(os.getpid(), signal.SIGUSR1)
        signal.signal(signal.SIGALRM, lambda *_: seen.append('alrm')); signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pause() if len(seen) < 2 else None
        assert seen == ['usr1', 'alrm']
        """,
    "keyboard_interrupt": """
        import os, signal
        try: os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt: pass
        else: raise AssertionError
        """,
    "pathlib": """
        from pathlib import Path
        Path('a/b').mkdir(parents=True); (Path('a/b') / 'c.txt').write_text('x')
        Path('a/link').symlink_to('b'); Path('a/b/c.txt').rename('a/d.txt')
        assert Path('a/d.txt').resolve() == Path.cwd() / 'a/d.txt' and Path('a/link').is_dir()
        assert sorted(map(str, Path('a').iterdir())) == ['a/b', 'a/d.txt', 'a/link'] and Path.home().is_dir()
        """,
    "shutil": """
        import os, pathlib, shutil
        pathlib.Path('one').mkdir(); pathlib.Path('one/f').write_text('x')
        shutil.copytree('one', 'two'); shutil.move('two', '/tmp/three'); shutil.make_archive('four', 'zip', 'one')
        shutil.rmtree('one'); assert os.listdir('/tmp/three') == ['f'] and os.path.exists('four.zip')
        assert shutil.disk_usage('.').total > 0 and shutil.which('sh')
        """,
    "os_replace_and_locks": """
        import fcntl, os
        with open('a', 'w') as file: fcntl.flock(file, fcntl.LOCK_EX); file.write('x'); file.flush(); os.fsync(file)
        os.replace('a', 'b'); os.link('b', 'c'); os.truncate('c', 0); os.chmod('b', 0o600); os.utime('b')
        assert os.stat('b').st_nlink == 2
        """,
    "mmap": """
        import mmap
        memory = mmap.mmap(-1, 2**20); memory[:2] = b'hi'; assert memory[:2] == b'hi'
        open('f', 'wb').write(b'x' * 4096)
        with open('f', 'r+b') as file, mmap.mmap(file.fileno(), 0) as view: view[0:1] = b'y'
        assert open('f', 'rb').read(2) == b'yx'
        """,
    "uuid_and_random": """
        import os, random, uuid
        assert uuid.uuid4() != uuid.uuid4() and uuid.uuid1() and len(os.urandom(16)) == 16
        random.seed(1); assert random.random() < 1 and random.SystemRandom().random() < 1
        assert len(open('/dev/urandom', 'rb').read(4)) == 4
        """,
    "decimal_and_fractions": """
        import decimal, fractions, statistics
        assert decimal.Decimal('0.1') + decimal.Decimal('0.2') == decimal.Decimal('0.3')
        assert fractions.Fraction(1, 3) * 3 == 1 and statistics.stdev([1, 2, 3]) == 1
        """,
    "zipfile": """
        import zipfile
        with zipfile.ZipFile('a.zip', 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr('f', 'x' * 10_000)
        assert zipfile.ZipFile('a.zip').read('f') == b'x' * 10_000
        """,
    "tarfile": """
        import pathlib, tarfile
        pathlib.Path('f').write_text('hello')
        with tarfile.open('a.tar.gz', 'w:gz') as archive: archive.add('f')
        pathlib.Path('out').mkdir()
        with tarfile.open('a.tar.gz') as archive: archive.extractall('out')
        assert pathlib.Path('out/f').read_text() == 'hello'
        """,
    "compression": """
        import bz2, gzip, lzma, zlib
        for each in (bz2, gzip, lzma, zlib): assert each.decompress(each.compress(b'x' * 100_000)) == b'x' * 100_000
        """,
    "logging": """
        import logging, logging.handlers
        logging.basicConfig(filename='a.log', level='INFO', format='%(process)d %(message)s')
        logging.info('hello'); logging.shutdown()
        assert open('a.log').read().endswith(' hello\\n')
        """,
    "argparse_and_environment": """
        import argparse, os, sys
        parser = argparse.ArgumentParser(); parser.add_argument('--n', type=int)
        assert parser.parse_args(['--n', '3']).n == 3
        assert os.environ['HOME'] == os.path.expanduser('~') and sys.argv[0].endswith('script.py')
        os.environ['MINE'] = '1'
        import subprocess
        assert subprocess.run(['sh', '-c', 'echo $MINE'], capture_output=True, text=True).stdout == '1\\n'
        """,
    "who_and_where": """
        import getpass, grp, locale, os, platform, pwd, socket
        assert getpass.getuser() == pwd.getpwuid(os.getuid()).pw_name == grp.getgrgid(os.getgid()).gr_name
        assert platform.system() == 'Linux' and socket.gethostbyname('localhost') == '127.0.0.1' and os.cpu_count()
        assert socket.gethostname() and locale.setlocale(locale.LC_ALL, '') and os.getcwd() == os.path.abspath('.')
        """,
    "re_and_text": """
        import difflib, re, string, textwrap, unicodedata
        assert re.findall(r'\\w+', 'naïve café') == ['naïve', 'café'] and textwrap.wrap('a b c', 3) == ['a b', 'c']
        assert unicodedata.name('é') and difflib.get_close_matches('appel', ['apple', 'ape'])
        """,
    "pickle_and_xml": """
        import configparser, pickle, tomllib, xml.etree.ElementTree as tree
        assert pickle.loads(pickle.dumps({1: {2, 3}})) == {1: {2, 3}} and tomllib.loads('a = 1') == {'a': 1}
        assert tree.fromstring('<a><b c="1"/></a>').find('b').get('c') == '1' and configparser.ConfigParser()
        """,
    "unittest": """
        import unittest
        class Case(unittest.TestCase):
            def test(self): self.assertEqual(1, 1)
        import io
        assert unittest.TextTestRunner(stream=io.StringIO()).run(Case('test')).wasSuccessful()
        """,
    "memory_of_200_MB": "data = bytearray(200 * 2**20); data[::4096] = b'x' * len(data[::4096]); assert len(data)",
    "fork_and_wait": """
        import os
        pid = os.fork()
        if not pid: os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        """,
    "own_process": """
        import gc, os, resource, sys, tracemalloc
        assert open('/proc/self/status').read() and os.listdir('/proc/self/fd') and os.getppid() == 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.nice(1); os.umask(0o077); os.sched_setaffinity(0, os.sched_getaffinity(0)); gc.collect()
        """,
    "devices": """
        with open('/dev/null', 'w') as file: file.write('x')
        with open('/dev/zero', 'rb') as file: assert file.read(3) == b'\\0\\0\\0'
        with open('/dev/stderr', 'w') as file: file.write('')
        import sys
        assert sys.stdin.read() == '' and not sys.stdin.isatty()
        """,
    "big_output": "import sys; sys.stderr.write('y' * 300_000); print('x' * 300_000)",
    "shelve": """
        import shelve
        with shelve.open('s') as shelf: shelf['a'] = [1, 2]
        with shelve.open('s') as shelf: assert shelf['a'] == [1, 2]
        """,
    "atexit_and_exit": """
        import atexit, sys
        atexit.register(lambda: open('left', 'w').write('x')); print('ok'); sys.exit(0)
        """,
}

SCRIPTS = {name: f"{dedent(source).strip()}\nprint('ok')\n" for name, source in _SOURCES.items()}
"""The programs by name. The last line of what each prints is "ok"."""
