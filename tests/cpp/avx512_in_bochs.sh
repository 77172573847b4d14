#!/usr/bin/env bash
# Runs test_simd_levels on an emulated Skylake-X processor, so that the AVX-512 kernels' own instructions execute on a machine without them.
# Debian packages: bochs bochsbios vgabios xorriso isolinux syslinux-common linux-image-cloud-amd64 (its kernel is booted, not installed:
# pass the path of a vmlinuz as the first argument, default: the newest in /boot). Takes some minutes. VQK_ROWS sets the rows (default 1000000).
set -euo pipefail
cd "$(dirname "$0")/../.."
kernel=${1:-$(ls -v /boot/vmlinuz-* | tail -n 1)}
work=$(mktemp -d)
[ -n "${VQK_KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work/disk" "$work/iso"
g++ -O3 -std=c++20 -ffp-contract=off -static -DVQK_TEST_BYTES -I csrc/include tests/cpp/test_simd_levels.cpp csrc/cpu/*.cpp -o "$work/disk/init"
mkdir "$work/disk/dev" && mknod "$work/disk/dev/console" c 5 1
(cd "$work/disk" && find . | cpio -o -H newc --quiet | gzip >"$work/iso/initrd.gz")
cp "$kernel" "$work/iso/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/iso/"
printf 'DEFAULT test\nPROMPT 0\nLABEL test\n KERNEL vmlinuz\n APPEND initrd=initrd.gz console=ttyS0 mitigations=off nokaslr nopku clearcpuid=321,323 loglevel=1 VQK_ROWS=%s\n' \
  "${VQK_ROWS:-1000000}" >"$work/iso/isolinux.cfg"
xorriso -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table "$work/iso"
cat >"$work/bochsrc" <<RC
display_library: rfb, options="timeout=0"
megs: 1024
cpu: model=corei7_skylake_x, count=1, ips=100000000
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
clock: sync=none
log: $work/log
panic: action=fatal
RC
mkfifo "$work/commands"
bochs -q -f "$work/bochsrc" >"$work/out" 2>&1 <"$work/commands" &
emulator=$!
exec 3>"$work/commands"
echo c >&3  # Debian's build starts in its debugger: continue
for _ in $(seq "${VQK_TIMEOUT:-1800}"); do
  sleep 1
  grep -q "finished with status\|Kernel panic" "$work/serial" 2>/dev/null && break
  kill -0 "$emulator" 2>/dev/null || break
done
kill "$emulator" 2>/dev/null || true
tr -d '\r' <"$work/serial" | tail -n 20 || tail -n 20 "$work/log" "$work/out"
grep -q "finished with status 0" "$work/serial" && grep -q "avx512 *same bits" "$work/serial"
