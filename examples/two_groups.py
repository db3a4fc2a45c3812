"""Two groups of ranks in one asyncio loop, with a heartbeat, and a timeout that ends what hangs."""

from __future__ import annotations

import asyncio

from rankspawn import launch


async def heartbeat() -> None:
    while True:
        print("alive", flush=True)
        await asyncio.sleep(3600)


async def job(name: str, script: str, seconds: float) -> None:
    async with launch(["sh", "-c", script], 2, grace=5) as group:
        try:
            print(name, await asyncio.wait_for(asyncio.ensure_future(group), seconds))
        except asyncio.TimeoutError:
            print(name, "hangs: ranks", *group.running)  # leaving the block ends them, with their grace
    print(name, "has ended", group.poll())


async def main() -> None:
    beat = asyncio.create_task(heartbeat())
    await asyncio.gather(job("short", "exit 0", 60), job("long", "exec sleep 3600", 0.5))
    beat.cancel()


if __name__ == "__main__":
    asyncio.run(main())
