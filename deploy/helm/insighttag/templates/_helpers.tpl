{{- define "insighttag.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "insighttag.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "insighttag.labels" -}}
{{ include "insighttag.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "insighttag.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "insighttag.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- /* The settings file of a component: the chart's choices, the user's over them, and last what
the rest of the chart counts on. */ -}}
{{- define "insighttag.settings" -}}
{{- $root := .root -}}
{{- $user := deepCopy $root.Values.settings -}}
{{- $bundle := dict "bundle" (printf "workshop/weights/%s" $root.Values.weights.bundle) -}}
{{- $chosen := dict "log" (dict "format" "json") -}}
{{- $fixed := dict "fusion" $bundle -}}
{{- if eq .component "daemon" -}}
{{- $drain := $root.Values.daemon.drainTimeoutSeconds -}}
{{- $deadline := dig "king" "post_deadline_s" 300 $user -}}
{{- if le (float64 $drain) (float64 $deadline) -}}
{{- fail (printf "daemon.drainTimeoutSeconds: %v is not above king.post_deadline_s (%v): a pod that ends would break posts off" $drain $deadline) -}}
{{- end -}}
{{- $_ := set $fixed "king" (dict "metrics" "0.0.0.0:9465" "drain_timeout_s" $drain "health_file" "workshop/run/king.json") -}}
{{- if $root.Values.gpu.enabled -}}
{{- $all := list "video" "image" "audio" "text" "ocr" "asr" -}}
{{- $_ := set $chosen "workers" (dict "extractors" (list (dict "device" "cuda:0" "extractors" $all))) -}}
{{- $_ := set $chosen "fusion" (dict "device" "cuda:0") -}}
{{- end -}}
{{- else -}}
{{- $names := concat (list (printf "%s-web" (include "insighttag.name" $root))) $root.Values.web.allowedHosts -}}
{{- $_ := set $fixed "http" (dict "host" "0.0.0.0" "port" 8080 "allowed_hosts" $names) -}}
{{- end -}}
{{- mergeOverwrite $chosen $user $fixed | toYaml -}}
{{- end -}}

{{- define "insighttag.image" -}}
{{- $kind := ternary "cuda" "cpu" (and .root.Values.gpu.enabled (eq .component "daemon")) -}}
{{- $tag := .root.Values.image.tag | default (printf "%s-%s" .root.Chart.AppVersion $kind) -}}
{{- printf "%s:%s" .root.Values.image.repository $tag -}}
{{- end -}}

{{- define "insighttag.env" -}}
{{- $secrets := .root.Values.secrets -}}
- name: INSIGHTTAG_BROKER__URL
  valueFrom: {secretKeyRef: {name: {{ $secrets.name }}, key: {{ $secrets.brokerUrl }}}}
- name: INSIGHTTAG_STORE__URL
  valueFrom: {secretKeyRef: {name: {{ $secrets.name }}, key: {{ $secrets.storeUrl }}}}
{{- if $secrets.cacheUrl }}
- name: INSIGHTTAG_CACHE__URL
  valueFrom: {secretKeyRef: {name: {{ $secrets.name }}, key: {{ $secrets.cacheUrl }}}}
{{- end }}
{{- with .more }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "insighttag.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "insighttag.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "insighttag.mounts" -}}
- {name: settings, mountPath: /etc/insighttag, readOnly: true}
- {name: weights, mountPath: /srv/insighttag/workshop/weights, readOnly: true}
- {name: run, mountPath: /srv/insighttag/workshop/run}
- {name: spool, mountPath: /srv/insighttag/workshop/spool}
- {name: huggingface, mountPath: /srv/insighttag/workshop/huggingface}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "insighttag.volumes" -}}
- name: settings
  configMap: {name: {{ include "insighttag.name" .root }}-{{ .component }}}
- name: weights
  persistentVolumeClaim: {claimName: {{ .root.Values.weights.existingClaim }}, readOnly: true}
{{- range list "run" "spool" "huggingface" "tmp" }}
- name: {{ . }}
  emptyDir: {sizeLimit: {{ $.root.Values.scratch.sizeLimit }}}
{{- end }}
{{- end -}}

{{- define "insighttag.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "insighttag.probe" -}}
exec:
  command:
    - python
    - -m
    - deploy.probe
    - --config
    - /etc/insighttag/settings.yaml
    {{- if .ready }}
    - --ready
    {{- end }}
timeoutSeconds: 15
{{- end -}}
